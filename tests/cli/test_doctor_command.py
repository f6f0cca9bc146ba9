"""`penstock doctor` from its flags to its lines and exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support import fake_backend

from penstock import cli, models, platform


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the user's, and a port that nobody holds."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("OPENAI_API_KEY", "PENSTOCK_PRETEND", "PENSTOCK_HOST", "PENSTOCK_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with platform.listen("127.0.0.1", 0) as free:
        monkeypatch.setenv("PENSTOCK_PORT", str(free.getsockname()[1]))


def findings(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, list[str]]]:
    """Exit code, and the levels by area."""
    code = cli.main(["doctor", "--json", *flags])
    told = json.loads(capsys.readouterr().out)
    assert told["self_test"] is None
    levels: dict[str, list[str]] = {}
    for finding in told["findings"]:
        assert set(finding) == {"area", "level", "what", "change"}
        levels.setdefault(finding["area"], []).append(finding["level"])
    return code, levels


def test_a_sound_machine_is_ok_in_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("✗")]
    for words in ("✓ machine  mlx ", "✓ model    weight files", "✓ options  a server would start"):
        assert any(line.startswith(words) for line in lines), words


def test_a_running_server_is_found_by_its_port(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_backend.serving() as server:
        monkeypatch.setenv("PENSTOCK_PORT", str(server.port))
        code, levels = findings(capsys)
    assert code == 0
    assert levels["server"] == ["ok", "ok"]
    assert levels["options"] == ["ok"], "its own port is in use, as it should be"


def test_a_port_in_use_by_something_else_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with platform.listen("127.0.0.1", 0) as other:
        monkeypatch.setenv("PENSTOCK_PORT", str(other.getsockname()[1]))
        monkeypatch.setattr("penstock.doctor.examine.served_model", refuse)
        code, levels = findings(capsys)
    assert (code, levels["options"], "server" in levels) == (1, ["fail"], False)


def refuse(*_: object) -> None:
    from penstock.traffic.client import ServerProblem

    raise ServerProblem("it does not speak HTTP.")


def test_an_open_host_without_a_key_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_HOST", "0.0.0.0")
    assert cli.main(["doctor"]) == 1
    told = "✗ options  --host 0.0.0.0 can be reached from other machines: set --api-key or --api-key-file,"
    assert told in capsys.readouterr().out
    monkeypatch.setenv("PENSTOCK_API_KEY", "k")
    assert findings(capsys)[0] == 0


def test_a_wrong_setting_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_MAX_TOKENS", "lots")
    code, levels = findings(capsys)
    assert (code, levels["options"]) == (1, ["fail"])


def test_a_server_that_was_named_and_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, levels = findings(capsys, "--url", "http://127.0.0.1:9")
    assert (code, levels["server"]) == (1, ["fail"])


@pytest.mark.parametrize("model", ["no/such/dir/at/all", "."])
def test_what_is_no_model_fails(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, levels = findings(capsys, model)
    assert (code, levels["model"]) == (1, ["fail"])


def test_too_little_memory_for_a_model_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_PRETEND", '{"physical": "8MB"}')
    code, levels = findings(capsys, str(models.DEMO))
    assert (code, levels["model"][-1]) == (1, "fail")


def test_a_machine_without_a_back_end_is_told_what_to_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "backend_problem", lambda: "Run this.")
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == "✗ machine  Run this.\n"


@pytest.mark.parametrize("flags", [["--url", "nonsense"], ["--scale", "0"]])
def test_wrong_options(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *flags])
    assert ended.value.code == 2
    assert f"argument {flags[0]}: must be" in capsys.readouterr().err
