"""The front as a process, with a scripted engine: how it stops, and how it lets an idle engine go."""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.support.client_model import write_client_model
from tests.support.hang_ups import post, until
from tests.support.serve_scripted import ScriptedServer

BODY = {"messages": [{"role": "user", "content": "x"}], "stream": True}
ENDLESS = {"when": "", "pieces": ["word "] * 1000, "step": 0.05}


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_client_model(tmp_path_factory.mktemp("front") / "model")


def get(server: ScriptedServer, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any, Any]:
    """Status, headers and JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers, json.load(refused)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_first_signal_admits_nothing_more_and_the_second_ends_at_once(
    model: Path, tmp_path: Path
) -> None:
    with ScriptedServer(model, tmp_path, "--drain-timeout", "600") as server:
        server.rules(ENDLESS)
        with contextlib.closing(post(server.port, BODY)) as stream:
            until(stream, b'"content":"', 3)
            engine = get(server, "/health")[2]["engine"]["pid"]
            server.process.terminate()
            server.until(lambda: get(server, "/health")[2]["status"] == "stopping")
            status, headers, body = get(server, "/v1/chat/completions", {**BODY, "stream": False})
            assert (status, body["error"]["code"]) == (503, "shutting_down")
            assert int(headers["Retry-After"]) >= 1
            assert get(server, "/health")[0] == 503
            assert until(stream, b'"content":"', 3), "the open one goes on"
            server.process.terminate()
            assert server.process.wait(10) == 130
        end = time.monotonic() + 20
        while alive(engine) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(engine), "no engine is left"


@pytest.mark.parametrize("source", [[{"name": "default"}], [{"name": "default", "template": 5}]])
def test_files_that_cannot_be_read_are_told_and_end_the_server(tmp_path: Path, source: object) -> None:
    model = write_client_model(tmp_path / "model")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    server = ScriptedServer(model, tmp_path)
    try:
        assert server.process.wait(30) == 2
    finally:
        server.stop()
    assert " can't be read: " in server.log().splitlines()[-1]
    assert "Traceback" not in server.log()


def test_an_engine_that_nobody_needs_ends_and_the_next_request_waits_for_it(
    model: Path, tmp_path: Path
) -> None:
    with ScriptedServer(model, tmp_path, "--idle-unload", "0.01", keepalive=0.01) as server:
        engine = get(server, "/health")[2]["engine"]["pid"]
        server.until(lambda: not get(server, "/v1/status")[2]["engine"])
        assert not alive(engine)
        status, _, health = get(server, "/health")
        assert (status, health["status"], health["engine_deaths"]) == (200, "unloaded", 0)
        assert health["given_back"]["engine"] > 0
        with contextlib.closing(post(server.port, BODY)) as stream:
            came = until(stream, b"[DONE]")
        role, keepalive, text = (
            came.find(mark) for mark in (b'"role":"assistant"', b'"delta":{}', b'"content":"f')
        )
        assert 0 < role < keepalive < text, "headers at once, then keepalives, then the answer"
        assert get(server, "/health")[2]["engine_deaths"] == 0
        assert "the engine was given back" in server.log()
        assert "died" not in server.log()
