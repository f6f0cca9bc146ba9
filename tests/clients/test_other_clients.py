"""Client libraries of other languages and makers: a chat, a stream, a tool call and errors over each API.

Each program in `programs` does all of it in one run and prints what it got; the tests look at that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support import node_packages, npm, python_clients
from tests.support.serve_scripted import ScriptedServer

pytestmark = pytest.mark.clients

PROGRAMS = Path(__file__).parent / "programs"
CALL = ["<tool_call>", '\n{"name": "read", "arguments": {"path": "a b.txt"}}\n', "</tool_call>"]
RULES = [
    {"when": "<tool_response>\nBlue.\n</tool_response>", "pieces": ["It is blue."]},
    {"when": "break here", "pieces": ["half "], "reason": "error"},
    {"when": "which colour", "pieces": ["Let me look.\n", *CALL]},
    {"when": "count", "pieces": ["one ", "two ", "three"], "step": 0.05},
    {"when": "hello", "pieces": ["Good", " morning", "."]},
]
CLIENTS = {
    "openai for JavaScript, chat": (node_packages.OPENAI, "openai.mjs", "chat"),
    "openai for JavaScript, responses": (node_packages.OPENAI, "openai.mjs", "responses"),
    "anthropic for JavaScript": (node_packages.ANTHROPIC, "anthropic.mjs", "messages"),
    "LangChain, chat": (None, "langchain_chat.py", "chat"),
    "LangChain, responses": (None, "langchain_chat.py", "responses"),
    "LiteLLM, chat": (None, "litellm_sdk.py", "chat"),
    "LiteLLM, messages": (None, "litellm_sdk.py", "messages"),
}

Results = dict[str, Any]


@pytest.fixture(scope="module", params=CLIENTS)
def got(
    request: pytest.FixtureRequest, server: ScriptedServer, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    package, program, api = CLIENTS[request.param]
    if package is None:
        python = python_clients.installed()
        if python is None:
            pytest.skip("no registry of Python packages can be reached")
        command: list[Path | str] = [python, PROGRAMS / program]
    else:
        node = node_packages.installed(package)
        if node is None:
            pytest.skip("npm is not installed")
        command = [node[0], PROGRAMS / program, node[1]]
    server.rules(*RULES)
    scratch = tmp_path_factory.mktemp("client")
    outcome = npm.run([*command, server.url, api], scratch, 180, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert outcome.code == 0, outcome.noise[-3000:]
    results: Results = json.loads(outcome.said.splitlines()[-1])
    return results


def test_chat(got: Results) -> None:
    assert got["chat"] == {"text": "Good morning."}


def test_stream(got: Results) -> None:
    assert "error" not in got["stream"]
    assert "".join(got["stream"]["parts"]) == "one two three"
    assert len(got["stream"]["parts"]) >= 3


def test_tool_call_and_its_result(got: Results) -> None:
    assert got["tool"] == {"name": "read", "given": {"path": "a b.txt"}, "text": "It is blue."}


def test_a_bad_request_is_an_error_that_names_the_field(got: Results) -> None:
    assert got["refused"]["status"] == 400
    assert "temperature" in got["refused"]["error"]


def test_a_stream_that_fails_is_an_error(got: Results) -> None:
    assert "".join(got["broken"]["parts"]) == "half"
    assert "out of memory" in got["broken"]["error"]
