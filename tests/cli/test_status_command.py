"""`penstock status` against servers that are there, that are not, and that are something else."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tests.support.client_model import write_client_model
from tests.support.hang_ups import post, until
from tests.support.serve_scripted import ROOT, ScriptedServer

from penstock import cli

STREAM = {"messages": [{"role": "user", "content": "x"}], "stream": True}
PENSTOCK = [sys.executable, "-c", "import sys; from penstock.cli import main; sys.exit(main())", "status"]


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    scratch = tmp_path_factory.mktemp("status")
    with ScriptedServer(write_client_model(scratch / "model"), scratch) as server:
        server.rules({"when": "", "pieces": ["x"] * 10_000, "step": 0.05})
        yield server


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_once_prints_the_picture(
    server: ScriptedServer, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(post(server.port, STREAM)) as stream:
        until(stream, b'"content":"', 2)
        assert cli.main(["status", "--once", "--url", server.url + suffix]) == 0
    shown = capsys.readouterr().out
    assert "ready, up" in shown
    assert "1 running, 0 queued" in shown
    assert re.search(r"^[0-9a-f]{8} +decode", shown, re.MULTILINE)
    assert "\x1b" not in shown, "no colours where nobody looks"


def test_json_is_what_the_server_says(
    server: ScriptedServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert cli.main(["status", "--json", "--url", server.url]) == 0
    assert json.loads(capfdbinary.readouterr().out)["state"] == "ready"


def test_while_the_engine_is_dead_there_is_a_picture(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--json", "--url", server.url]) == 0
    os.kill(json.loads(capsys.readouterr().out)["engine"]["pid"], signal.SIGKILL)
    assert cli.main(["status", "--once", "--url", server.url]) == 0
    server.until(lambda: "died" in server.log())
    assert cli.main(["status", "--once", "--url", server.url]) == 0
    assert "The engine died: killed by signal 9" in " ".join(capsys.readouterr().out.split())


def test_no_server_is_said_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # not listening: refused at once
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert cli.main(["status", "--url", url]) == 1
    assert capsys.readouterr().err == f"penstock: no server answers at {url} (Connection refused).\n"


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/", "http://", "http://[", "http://127.0.0.1:x"])
def test_what_is_no_address_is_said(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", url]) == 2
    assert capsys.readouterr().err == f"penstock: --url {url.rstrip('/')} is no http address.\n"


@pytest.mark.parametrize(
    ("code", "body"), [(404, b"{}"), (200, b"<html>"), (200, b'{"status": "ok"}'), (200, b"\xff")]
)
def test_another_server_is_not_taken_for_one(
    code: int, body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert cli.main(["status", "--once", "--url", f"http://127.0.0.1:{other.server_port}"]) == 2
        other.shutdown()
    assert "is no Penstock" in capsys.readouterr().err


def test_a_key_comes_from_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_API_KEY", "sesame")
    with ScriptedServer(write_client_model(tmp_path / "model"), tmp_path) as server:
        assert cli.main(["status", "--once", "--url", server.url]) == 0
        monkeypatch.delenv("PENSTOCK_API_KEY")
        assert cli.main(["status", "--once", "--url", server.url]) == 2
    assert "set PENSTOCK_API_KEY" in capsys.readouterr().err


def test_a_proxy_in_the_environment_is_not_asked(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert cli.main(["status", "--once", "--url", server.url]) == 0


class Terminal:
    """The command in a terminal of its own, of 24 lines by 80."""

    def __init__(self, *arguments: str) -> None:
        self.end, inner = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "LINES": "24", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [*PENSTOCK, *arguments], cwd=ROOT, stdin=inner, stdout=inner, stderr=inner, env=environment
        )
        os.close(inner)
        self.text = ""

    def until(self, words: str, seconds: float = 30.0) -> None:
        """Waits until the words have come since the last wait."""
        end, came = time.monotonic() + seconds, ""
        while words not in came:
            assert time.monotonic() < end, came[-3000:]
            if select.select([self.end], [], [], 0.1)[0]:
                came += os.read(self.end, 65536).decode(errors="replace")
        self.text += came

    def exit_code(self, seconds: float = 30.0) -> int:
        """Waits for its end. What it still writes is read: it would wait for that."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, "it does not end"
            if select.select([self.end], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.end, 65536)
        return self.process.returncode


def test_it_is_live_in_a_terminal_and_outlives_its_server(tmp_path: Path) -> None:
    with ScriptedServer(write_client_model(tmp_path / "model"), tmp_path) as server:
        server.rules({"when": "", "pieces": ["x"] * 10_000, "step": 0.05})
        terminal = Terminal("--url", server.url, "--interval", "0.1")
        try:
            terminal.until("0 running")
            with contextlib.closing(post(server.port, STREAM)):
                terminal.until("1 running")
            terminal.until("0 running")
            server.stop()
            terminal.until("no answer for")
            terminal.process.send_signal(signal.SIGINT)
            assert terminal.exit_code() == 0
        finally:
            terminal.process.kill()
            os.close(terminal.end)


def test_asking_for_help_loads_neither_rich_nor_msgspec() -> None:
    code = (
        "import sys\nfrom penstock.cli import main\n"
        "try: main(['status', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'rich', 'msgspec', 'http.client'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
