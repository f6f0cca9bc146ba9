"""What the front makes of ids goes on over an engine's death: calls of tools, reasoning, stops, letters."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from typing import Any

import pytest
from tests.support.client_model import write_client_model
from tests.support.serve_scripted import ScriptedServer

TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}
CALL = '\n{"name": "read", "arguments": {"path": "über.txt"}}\n'
PIECES = ["<think>", "so it is", "</think>", "good — naïve 漢字 day", "<tool_call>", CALL, "</tool_call>"]
STEP = 0.01
KILLS = 2
REQUESTS: dict[str, dict[str, Any]] = {
    "tool call": {"tools": [TOOL]},
    "tool call in a stream": {"tools": [TOOL], "stream": True},
    "a stop string": {"stop": ["字 d"], "stream": True},
    "two choices with log-probabilities": {"n": 2, "logprobs": True, "top_logprobs": 2, "stream": True},
}


def ask(server: ScriptedServer, fields: dict[str, Any]) -> dict[str, Any]:
    """Everything that came, whatever the chunks, names apart."""
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    if fields.get("stream"):
        body["stream_options"] = {"include_usage": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", json.dumps(body).encode(), headers=headers
    )
    said: dict[str, Any] = {}
    with urllib.request.urlopen(request, timeout=60) as answer:
        if not fields.get("stream"):
            whole = json.load(answer)
            message = whole["choices"][0]["message"]
            for call in message["tool_calls"]:
                del call["id"]
            return {"message": message, "usage": whole["usage"], "end": whole["choices"][0]["finish_reason"]}
        lines = [line[6:].strip() for line in answer if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    for chunk in map(json.loads, lines[:-1]):
        said["usage"] = chunk["usage"]
        for choice in chunk["choices"]:
            mine = said.setdefault(
                choice["index"], {"reasoning": "", "text": "", "calls": "", "logprobs": [], "end": []}
            )
            delta = choice["delta"]
            mine["reasoning"] += delta.get("reasoning") or ""
            mine["text"] += delta.get("content") or ""
            for call in delta.get("tool_calls", []):
                mine["calls"] += call["function"].get("name", "") + call["function"]["arguments"]
            mine["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            mine["end"] += [choice["finish_reason"]] * (choice["finish_reason"] is not None)
    return said


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory):
    scratch = tmp_path_factory.mktemp("carries")
    with ScriptedServer(write_client_model(scratch / "model"), scratch) as server:
        yield server


def kill_in_the_midst(server: ScriptedServer, over: threading.Event) -> None:
    """The engines, each once it has sent something."""
    killed: set[int] = set()
    while len(killed) < KILLS and not over.is_set():
        health = json.load(urllib.request.urlopen(server.url + "/v1/status", timeout=10))
        steps, pid = (health["engine"] or {}).get("steps", 0), (health["engine"] or {}).get("pid", 0)
        if steps > 5 and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.02)


@pytest.mark.parametrize("name", list(REQUESTS))
def test_what_is_made_of_ids_is_the_same_over_deaths(server: ScriptedServer, name: str) -> None:
    server.rules({"when": "", "pieces": PIECES, "step": STEP})
    expected = ask(server, REQUESTS[name])
    before = deaths(server)
    over = threading.Event()
    killer = threading.Thread(target=kill_in_the_midst, args=(server, over))
    killer.start()
    try:
        assert ask(server, REQUESTS[name]) == expected
    finally:
        over.set()
        killer.join()
    assert deaths(server) - before == KILLS


def deaths(server: ScriptedServer) -> int:
    return int(
        json.load(urllib.request.urlopen(server.url + "/v1/status", timeout=10))["counts"]["engine_deaths"]
    )
