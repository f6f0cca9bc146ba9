from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import penstock
from penstock import cli, config, platform
from penstock.cli import serve

PROBLEM = "penstock: "


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings, an empty hub cache and no network."""
    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> list[config.Options]:
    """Instead of serving, note the options."""
    served: list[config.Options] = []
    module = types.ModuleType("penstock.front")
    module.run = lambda options: served.append(options) or 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "penstock.front", module)
    monkeypatch.setattr(penstock, "front", module, raising=False)
    monkeypatch.setattr("penstock.log.setup", lambda level, form: None)
    return served


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The sentence that `penstock serve` ends with."""
    assert cli.main(["serve", *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(PROBLEM)
    assert "Traceback" not in err
    return err.removeprefix(PROBLEM).strip()


def test_a_model_is_served(front: list[config.Options], model: str) -> None:
    assert cli.main(["serve", model, "--port", "0"]) == 0
    assert [(options.model, options.port) for options in front] == [(model, 0)]


def test_without_a_model_the_choices_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "penstock serve --demo" in refused(capsys)
    folder = tmp_path / "hub" / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("r")
    (path := folder / "snapshots" / "r").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    told = refused(capsys)
    assert "\n  penstock serve org/name " in told
    assert "\n  penstock serve --demo" in told


def test_a_model_of_the_environment_or_the_file_will_do(
    front: list[config.Options], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_MODEL", model)
    assert cli.main(["serve", "--port", "0"]) == 0
    monkeypatch.delenv("PENSTOCK_MODEL")
    (tmp_path / "config" / "penstock").mkdir(parents=True)
    (tmp_path / "config" / "penstock" / "config.toml").write_text(f"model = {json.dumps(model)}\nport = 0")
    assert cli.main(["serve"]) == 0
    assert [options.model for options in front] == [model, model]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/no/such/place"], "/no/such/place does not exist."),
        (["org/name"], "org/name is not in the hub cache, and HF_HUB_OFFLINE forbids a download."),
        (["--demo", "org/name"], "--demo and a model exclude each other"),
        (["m", "--draft-model", "d"], "--draft-model: this is not supported yet."),
        (["m", "--adapter-path", "a"], "--adapter-path: this is not supported yet."),
        (["m", "--pipeline"], "--pipeline: "),
        (["m", "--kv-bits", "4"], "--kv-bits: "),
        (["m", "--port", "abc"], "--port must be a whole number from 0 to 65535, not 'abc'."),
        (["m", "--api-key", ""], "--api-key must be a key of visible ASCII characters"),
        (["m", "--api-key", "a", "--api-key", ""], "--api-key must be a key of visible ASCII characters"),
        (["m", "--api-key", "a", "--keyless"], "--keyless and API keys exclude each other"),
        (["m", "--api-key-file", "/no/such/file"], "--api-key-file /no/such/file cannot be read: No such"),
    ],
)
def test_what_the_user_must_mend_is_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    sentence = refused(capsys, *argv)
    assert sentence.startswith(said)
    assert "\n" not in sentence


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "my-mac.local"])
def test_other_machines_are_let_in_only_with_a_key(capsys: pytest.CaptureFixture[str], host: str) -> None:
    sentence = refused(capsys, "m", "--host", host)
    assert all(flag in sentence for flag in ("--api-key ", "--api-key-file", "--keyless"))
    for let_in in (["--api-key", "a"], ["--keyless"]):
        assert "m does not exist" in refused(capsys, "./m", "--host", host, *let_in)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_key(host: str) -> None:
    assert serve.is_loopback(host)


def test_a_busy_port_may_be_free_after_a_restart(capsys: pytest.CaptureFixture[str], model: str) -> None:
    with platform.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert f"Port {port} is in use" in refused(capsys, model, "--port", str(port), code=1)


def test_a_missing_back_end_is_said_before_the_port_is_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(platform, "backend", lambda: None)
    assert "MLX has no back end" in refused(capsys, model)


def test_printing_the_configuration_examines_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--print-config", "--temp", "0.5"]) == 0
    assert "temp = 0.5  # --temp" in capsys.readouterr().out


def test_mistyped_variables_are_said(
    front: list[config.Options],
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PENSTOCK_PROT", "1")
    assert cli.main(["serve", model, "--port", "0", "--prompt-cache-size", "10"]) == 0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("PENSTOCK_PROT ")
    assert dataclasses.asdict(front[0])["prompt_cache_size"] == 10


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import penstock.cli\n"
        "try: penstock.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "penstock" in loaded
    heavy = {"mlx", "mlx_lm", "transformers", "huggingface_hub", "asyncio", "uvicorn", "starlette"}
    assert not loaded & (heavy | {"msgspec", "tokenizers", "jinja2", "numpy", "tomllib", "socket"})
