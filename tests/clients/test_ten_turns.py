"""What agents send in a tool task of ten turns, played against the real engine: does the prompt cache hold?

The bodies are recorded from the agents themselves against a scripted engine, and played one after the other
against `penstock serve` with the demo model. Only how much is answered, and in what form, is changed.
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from tests.support.agents import AGENTS
from tests.support.recorder import Recorded, Recorder
from tests.support.serve_scripted import ScriptedServer
from tests.support.whole_server import WholeServer

from penstock.api import anthropic, chat, responses_request
from penstock.api.anthropic import MessagesRequest
from penstock.api.responses_request import ResponsesRequest
from penstock.api.schema import ChatRequest
from penstock.models import DEMO
from penstock.text.parts import TextParts

pytestmark = pytest.mark.clients

TURNS = 10
TASK = "Follow the notes from page 1 on and say which bird the last one names."
ERRAND = "Say which errand you run."
MOST = {
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/chat/completions": "max_tokens",
}
"""By path, what says how many tokens an answer may have."""


def call(name: str, arguments: dict[str, Any]) -> list[str]:
    return ["<tool_call>", "\n" + json.dumps({"name": name, "arguments": arguments}) + "\n", "</tool_call>"]


def record(agent: ModuleType, program: Path, model: Path, scratch: Path) -> list[Recorded]:
    """What the agent sends while it reads ten notes, one after the other, and sends out a sub-agent."""
    project = scratch / "project"
    project.mkdir()
    birds = [f"heron-{secrets.token_hex(4)}" for _ in range(TURNS)]
    pages = [project / f"page-{number}.txt" for number in range(TURNS + 1)]
    for number, bird in enumerate(birds):
        lines = [f"Line {line} of page {number} says nothing of birds." for line in range(30)]
        pages[number].write_text("\n".join([*lines, f"The bird of this page is a {bird}."]))
    rules = [{"when": birds[-1], "pieces": ["The last note names ", birds[-1], "."]}]
    for number in reversed(range(1, TURNS)):
        read = call(agent.TOOL, agent.arguments(pages[number]))
        rules.append({"when": birds[number - 1], "pieces": [f"Page {number} then. ", *read]})
    if (errand := agent.errand(ERRAND)) is not None:
        sent = {"when": birds[4], "pieces": call(*errand)}
        back = {"when": "It is done, errand-0815.", "pieces": rules[TURNS - 5]["pieces"]}
        at = next(i for i, rule in enumerate(rules) if rule["when"] == birds[4])
        rules[at : at + 1] = [back, sent]
        rules.append({"when": ERRAND, "pieces": ["It is done, errand-0815."]})
    first = call(agent.TOOL, agent.arguments(pages[0]))
    rules += [{"when": f'"name": "{agent.TOOL}"', "pieces": first}, {"when": "", "pieces": ["A title"]}]
    with ScriptedServer(model, scratch) as server, Recorder(server.port) as recorder:
        server.rules(*rules)
        outcome = agent.run(program, recorder.url, scratch, TASK, 240)
        assert outcome.code == 0, (outcome, server.log()[-3000:])
        assert birds[-1] in outcome.said
    return recorder.requests


def ids_of(asked: Recorded, text: TextParts) -> list[int]:
    """The ids of a request's prompt."""
    raw = asked.body
    if asked.path == "/v1/messages":
        raw, request = anthropic.as_chat(msgspec.convert(raw, MessagesRequest))
    elif asked.path == "/v1/responses":
        raw, request = responses_request.as_chat(raw, msgspec.convert(raw, ResponsesRequest))
    else:
        request = msgspec.convert(raw, ChatRequest)
    return chat.prompt_ids(text, raw["messages"], chat.function_tools(raw, request), request)[0].tolist()


def shared(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def cached(usage: dict[str, Any]) -> int:
    """Of the prompt, in any of the three APIs' words."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return int(details.get("cached_tokens", usage.get("cache_read_input_tokens", 0)))


def is_main(asked: Recorded) -> bool:
    """A turn of the task itself: no title, no sub-agent."""
    said = json.dumps(asked.body.get("messages") or asked.body.get("input"))
    return asked.path in MOST and bool(asked.body.get("tools")) and TASK in said


def long_demo(directory: Path) -> Path:
    """The demo model with a context that agents' prompts fit in."""
    shutil.copytree(DEMO, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131_072}))
    return directory


def play(server: WholeServer, requests: Iterable[Recorded], text: TextParts) -> list[tuple[int, int]]:
    """(ids shared with the turn before, ids from the cache) of the task's turns."""
    found: list[tuple[int, int]] = []
    before: list[int] = []
    for asked in requests:
        body = dict(asked.body)
        if asked.path in MOST:
            body |= {MOST[asked.path]: 8, "stream": False}
            body.pop("stream_options", None)
        answer = server.post(asked.path, body)
        if answer.status != 200:
            assert answer.status == 400, (asked.path, answer)
            assert answer.error.get("param") or "too long" in answer.error["message"], answer
            continue
        if is_main(asked):
            ids = ids_of(asked, text)
            found.append((shared(before, ids), cached(answer.body["usage"])))
            before = ids
    return found


def settled(server: WholeServer) -> dict[str, Any]:
    """What the cache holds when no row lives any more."""
    end = time.monotonic() + 30
    while (status := server.get("/v1/status").body)["memory"]["owners"]["live_kv"]:
        assert time.monotonic() < end
        time.sleep(0.1)
    return dict(status["cache"])


@pytest.mark.parametrize("agent", AGENTS)
def test_what_was_computed_once_comes_from_the_cache(
    model_dir: Path, tmp_path: Path, agent: ModuleType
) -> None:
    program = agent.installed()
    if program is None:
        pytest.skip("npm is not installed")
    requests = record(agent, program, model_dir, tmp_path)
    others = [asked for asked in requests if asked.path in MOST and not is_main(asked)]
    assert others or agent.errand(ERRAND) is None
    model = long_demo(tmp_path / "demo")
    text = TextParts.load(model)
    with WholeServer(model, tmp_path) as server:
        turns = play(server, requests, text)
        cache = settled(server)
    assert len(turns) >= TURNS
    assert all(hit >= 0.97 * common for common, hit in turns[1:]), turns
    assert not any(cache["evicted"].values())
    # Too little for everything: what goes is what a title and a sub-agent have left, and older turns' ends.
    with WholeServer(model, tmp_path, "--prompt-cache-bytes", str(int(0.85 * cache["bytes"]))) as server:
        turns = play(server, requests, text)
        cache = settled(server)
    assert cache["evicted"]["caps"] > 0
    assert all(hit >= 0.97 * common for common, hit in turns[1:]), turns
