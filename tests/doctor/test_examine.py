"""The doctor's facts, from this machine, from real model directories, from real servers."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.support import fake_backend

from penstock import __version__, models, platform
from penstock.config import Options
from penstock.doctor import examine

PLAN = {"machine": "a machine", "backend": "cpu", "ceiling_bytes": 10**9, "decided_by": "--memory-limit"}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(models.DEMO, tmp_path / "model"))


def levels(path: Path) -> list[str]:
    return [finding.level for finding in examine.model(path)]


def test_this_machine_is_described_without_loading_mlx() -> None:
    found = list(examine.machine(PLAN, 0))
    assert {finding.area for finding in found} == {"machine"}
    assert any(finding.what.startswith("mlx ") and finding.level == "ok" for finding in found)
    code = "import sys; from penstock.doctor import examine, selftest; print('mlx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_program_that_holds_a_model_is_found(tmp_path: Path) -> None:
    code = "b = bytearray(250_000_000); print('held', flush=True); import sys; sys.stdin.read()"
    command = [sys.executable, "-c", code, "-m", "mlx_lm.server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert any(pid == child.pid and "mlx_lm.server" in words for pid, words in platform.programs())
        found = [f for f in examine.machine(PLAN, 0) if f"process {child.pid}" in f.what]
        child.communicate()
    assert [finding.level for finding in found] == ["warn"]


def test_a_whole_model(demo: Path) -> None:
    assert levels(demo) == ["ok", "ok"]


def test_a_model_whose_download_broke_off(demo: Path) -> None:
    weights = demo / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (found,) = examine.model(demo)
    assert (found.level, "is cut off" in found.what) == ("fail", True)
    assert str(demo) not in found.what
    weights.write_bytes(b"not at all")
    assert levels(demo) == ["fail"]


def test_a_model_without_its_parts(demo: Path) -> None:
    (demo / "chat_template.jinja").unlink()
    config = json.loads((demo / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (demo / "tokenizer_config.json").write_text(json.dumps(config))
    assert levels(demo) == ["ok", "warn"]
    (demo / "tokenizer.json").write_text("{")
    assert levels(demo) == ["fail"]
    (demo / "tokenizer.json").unlink()
    (found,) = examine.model(demo)
    assert found.what == "model has no tokenizer.json"


def test_a_template_that_is_none(demo: Path) -> None:
    (demo / "chat_template.jinja").write_text("{% if")
    assert levels(demo) == ["fail"]


def test_a_running_server() -> None:
    with fake_backend.serving() as server:
        version, state = examine.server(server.url + "/v1", None)
        assert version.what == f"penstock {__version__}"
        assert (state.level, state.what) == ("ok", "it is ok, with org/fake")
        server.on_loop(lambda: server.backend.become("halted", "no room"))
        assert [finding.level for finding in examine.server(server.url + "/v1", None)] == ["ok", "fail"]


def test_a_server_with_a_key() -> None:
    with fake_backend.serving(options=Options(port=0, api_key="k")) as server:
        (refused,) = examine.server(server.url + "/v1", None)
        assert (refused.level, "set OPENAI_API_KEY" in refused.what) == ("fail", True)
        assert [finding.level for finding in examine.server(server.url + "/v1", "k")] == ["ok", "ok"]


def test_a_server_of_somebody_else() -> None:
    class Plain(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Plain) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        (found,) = examine.server(f"http://127.0.0.1:{server.server_port}/v1", None)
        server.shutdown()
        thread.join()
    assert (found.level, "no penstock" in found.what) == ("ok", True)


def test_nobody_there() -> None:
    (found,) = examine.server("http://127.0.0.1:9/v1", None)
    assert (found.level, "cannot be reached" in found.what) == ("fail", True)
