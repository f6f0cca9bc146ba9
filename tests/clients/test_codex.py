"""Codex where things go wrong: what it does then depends on words and events."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support import codex
from tests.support.serve_scripted import ScriptedServer

pytestmark = pytest.mark.clients

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
OFFERED = '"name": "exec_command"'


@pytest.fixture(scope="module")
def program() -> Path:
    found = codex.installed()
    if found is None:
        pytest.skip("npm is not installed")
    return found


@pytest.fixture
def server(model_dir: Path, tmp_path: Path) -> Iterator[ScriptedServer]:
    with ScriptedServer(model_dir, tmp_path, keepalive=1.0) as running:
        yield running
        assert "Traceback" not in running.log()


def call(name: str, **arguments: str) -> list[str]:
    return ["<tool_call>", "\n" + json.dumps({"name": name, "arguments": arguments}) + "\n", "</tool_call>"]


def test_an_answer_that_fails_is_asked_for_again(
    program: Path, server: ScriptedServer, tmp_path: Path
) -> None:
    server.rules({"when": "", "pieces": ["half "], "reason": "error"})
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(codex.run, program, server.url, tmp_path, "Say it.", 120)
        server.until(lambda: server.events("finished"), 60)
        server.rules({"when": "", "pieces": ["the whole answer"]})
        outcome = running.result()
    assert outcome.code == 0, outcome
    assert outcome.said.strip() == "the whole answer"
    prompts = {event["prompt"] for event in server.events("submit")}
    assert len(prompts) == 1, "what was said before the failure must not count as said"


def test_a_prompt_that_can_never_fit_is_told_in_its_words(
    program: Path, model_dir: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    shutil.copytree(model_dir, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    with ScriptedServer(small, tmp_path) as server:
        outcome = codex.run(program, server.url, tmp_path, "Say it.", 120)
        assert outcome.code != 0
        assert "ran out of room" in outcome.noise
        assert server.events("submit") == []


def test_an_image_that_it_looks_at_does_not_end_the_session(
    program: Path, server: ScriptedServer, tmp_path: Path
) -> None:
    (tmp_path / "project").mkdir()
    picture = tmp_path / "project" / "pixel.png"
    picture.write_bytes(PIXEL)
    server.rules(
        {"when": "[an image, which this model cannot see]", "pieces": ["I cannot see it."]},
        {"when": OFFERED, "pieces": call("view_image", path=str(picture))},
    )
    outcome = codex.run(program, server.url, tmp_path, "Look at pixel.png.", 120)
    assert (outcome.code, outcome.said.strip()) == (0, "I cannot see it."), outcome


def test_a_tool_of_a_namespace_is_found(program: Path, server: ScriptedServer, tmp_path: Path) -> None:
    server.rules(
        {"when": "invalid agent id nobody", "pieces": ["There is no such agent."]},
        {
            "when": "multi_agent_v1__close_agent",
            "pieces": call("multi_agent_v1__close_agent", target="nobody"),
        },
    )
    outcome = codex.run(program, server.url, tmp_path, "Close it.", 120)
    assert (outcome.code, outcome.said.strip()) == (0, "There is no such agent."), outcome


def test_reasoning_is_shown(program: Path, server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    note = tmp_path / "project" / "note.txt"
    note.write_text("A heron.\n")
    thought = ["<think>", "I shall read", " it.", "</think>"]
    server.rules(
        {"when": "A heron.", "pieces": ["A heron, then."]},
        {"when": OFFERED, "pieces": [*thought, "Reading. ", *call(codex.TOOL, **codex.arguments(note))]},
    )
    shown = ("--config", "show_raw_agent_reasoning=true")
    outcome = codex.run(program, server.url, tmp_path, "Which bird?", 120, *shown)
    assert (outcome.code, outcome.said.strip()) == (0, "A heron, then."), outcome
    assert "I shall read it." in outcome.noise
