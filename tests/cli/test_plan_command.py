"""`penstock plan` from its flags to its table; the truth of its figures is tests/engine/test_describe's."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from penstock import cli, models, weights
from penstock.cli import plan


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile of an earlier start, an empty hub cache, and no pretended machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("PENSTOCK_PRETEND", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_the_table_answers_what_people_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(models.DEMO), "--memory-limit", "1G"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "may be used     1.0 GB (--memory-limit)",
        "weights",
        "a token",
        "longest context",
        "at once",
    ):
        assert words in shown
    assert "estimated" in shown


def test_another_machine_computes_in_its_own_way(capsys: pytest.CaptureFixture[str]) -> None:
    """A Mac keeps half precision and has the working set that Metal recommends, less the reserve."""
    assert cli.main(["plan", str(models.DEMO), "--memory", "48G", "--json"]) == 0
    mac = json.loads(capsys.readouterr().out)
    assert mac["backend"] == "metal"
    assert mac["decided_by"] == "the device's limit"
    assert mac["ceiling_bytes"] == int(36_000_000_000 * 0.92)
    assert mac["longest"] == mac["context_length"]
    assert mac["weights_bytes"] == pytest.approx(weights.size(models.DEMO, widened=False), rel=0.01)


def test_what_does_not_fit_is_said_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(models.DEMO), "--memory-limit", "5MB"]) == 1
    assert "It does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["no/such/dir/at/all"], [str(models.DEMO), "--memory", "much"]])
def test_what_cannot_be_planned_is_one_sentence(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("penstock: ")
    assert told.count("\n") == 1


def test_of_a_model_on_the_hub_only_its_description_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[Any] = []

    def snapshot(name: str, *, allow_patterns: list[str], local_dir: Path) -> str:
        fetched.append((name, *allow_patterns))
        for file in ("config.json", "generation_config.json"):
            shutil.copy(models.DEMO / file, local_dir)
        return str(local_dir)

    tensors = {
        "a": types.SimpleNamespace(dtype="BF16", shape=[1], data_offsets=(0, 2_000_000_000)),
        "b": types.SimpleNamespace(dtype="U32", shape=[1], data_offsets=(2_000_000_000, 3_000_000_000)),
    }
    told = types.SimpleNamespace(files_metadata={"model.safetensors": types.SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: told)
    assert cli.main(["plan", "somebody/model", "--memory", "16G", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert fetched == [("somebody/model", "config.json", "generation_config.json")]
    assert (found["model"], found["weights_bytes"]) == ("somebody/model", 3_000_000_000)
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * 2, "two layers of bfloat16"


def test_a_hub_that_cannot_be_reached_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert cli.main(["plan", "somebody/model"]) == 1
    assert "the hub cannot give it now: no connection" in capsys.readouterr().err


def test_sessions_that_do_not_run_are_shown_as_none() -> None:
    sessions = {"8000": {"at_once": 3, "cache_bytes": 10**9}, "32000": {"at_once": 0, "cache_bytes": 0}}
    found = {"model": "m", "machine": "x", "ceiling_bytes": 2 * 10**9, "decided_by": "y", "fits": True,
             "weights_bytes": 10**8, "kv_bytes_per_token": 1000, "fixed_bytes_per_sequence": 0,
             "longest": 9000, "context_length": 40_000, "sessions": sessions,
             "steps": "measured"}  # fmt: skip
    lines = plan.table(found).splitlines()
    assert lines[-3].split() == ["at", "once", "3", "none"]
    assert lines[-2].split() == ["cache", "beside", "1", "1.0", "GB", "-"]


def test_the_type_that_most_weights_have_is_what_a_model_computes_in() -> None:
    def tensor(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "shape": [1], "data_offsets": [0, 1]}

    mixed = {
        "a": tensor("U32"),
        "b": tensor("U32"),
        "c": tensor("F16"),
        "d": tensor("F16"),
        "e": tensor("F32"),
    }
    assert weights.main_dtype(mixed) == "float16"
    assert weights.main_dtype({"a": tensor("U32")}) == "bfloat16"
