"""The whole program with a scripted engine: what its front has loaded, and what it says."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import pytest
from tests.support.client_model import write_client_model
from tests.support.serve_scripted import ScriptedServer

TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}
CALL = ["<think>", "so", "</think>", "<tool_call>", '\n{"name": "read", "arguments": {}}\n', "</tool_call>"]
SECRET = "heron in the reeds"
LONGEST_START = 10


def ask(server: ScriptedServer) -> str:
    """The finish reason of a chat request that has the server render, tokenise and parse a tool call."""
    body = {"messages": [{"role": "user", "content": SECRET}], "tools": [TOOL]}
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["choices"][0]["finish_reason"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_front_that_has_done_its_work_has_not_loaded_mlx(tmp_path: Path) -> None:
    model = write_client_model(tmp_path / "model")
    with ScriptedServer(model, tmp_path) as server:
        server.rules({"when": "", "pieces": CALL})
        assert ask(server) == "tool_calls"
        loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "tokenizers" in loaded  # what is loaded does show there
    assert "libmlx" not in loaded
    assert "/mlx/core" not in loaded


def test_the_log_is_short_and_holds_no_prompt(tmp_path: Path) -> None:
    model = write_client_model(tmp_path / "model")
    with ScriptedServer(model, tmp_path, "--log-level", "INFO") as server:
        server.until(lambda: "serving http" in server.log())
        assert len(server.log().splitlines()) <= LONGEST_START
        server.rules({"when": "", "pieces": CALL})
        before = len(server.log().splitlines())
        ask(server)
        server.until(lambda: len(server.log().splitlines()) > before)
        said = server.log().splitlines()[before:]
    assert len(said) == 1
    assert " prompt " in said[0]
    assert SECRET not in server.log()
