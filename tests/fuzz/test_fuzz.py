"""A little of each target, so that what is fuzzed stays fuzzable; `make fuzz` does more."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tests.fuzz import in_process, targets
from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import TARGETS

from penstock.text import conversation, tools


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found_in_a_few_inputs(name: str) -> None:
    try:
        fuzz(name, 0, 30)
    finally:
        if targets.server.cache_info().currsize:
            targets.server().stop()
            targets.server.cache_clear()


def test_a_fault_of_the_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Content of a type that is not text is taken for text, and fails where it is rendered."""
    monkeypatch.setattr(
        conversation, "_text", lambda content, path: "".join(part["text"] for part in content)
    )
    with pytest.raises(AssertionError, match="Internal error"):
        fuzz("requests", 0, 400)


def test_a_hang_is_found() -> None:
    hopeless = re.compile("(a|a)*b")
    with pytest.raises(AssertionError, match="still at work"), targets.alarm(0.2):
        hopeless.match("a" * 100)


def test_a_parser_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: tools.ToolFormat, text: str, schemas: Any, index: int) -> Any:
        parsed = self.parser(text, schemas)
        return [tools._call(one, index) for one in (parsed if isinstance(parsed, list) else [parsed])]

    monkeypatch.setattr(tools.ToolFormat, "parse", careless)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the parser raises
        fuzz("calls", 0, 100)


@pytest.mark.parametrize(
    ("path", "status", "answer"),
    [
        ("/v1/completions", 500, b"{}"),
        ("/v1/completions", 200, b'data: {"choices": []}\n\n'),
        ("/v1/completions", 200, b'data: {"error": {}}\n\ndata: [DONE]\n\n'),
        ("/v1/completions", 400, b'{"type": "error", "error": {"message": "x"}}'),
        ("/v1/messages", 200, b'event: ping\ndata: {"type": "ping"}\n\n'),
        (
            "/v1/chat/completions",
            200,
            b'{"choices": [{"message": {"tool_calls": [{"function": {"arguments": "["}}]}}]}',
        ),
    ],
)
def test_answers_that_are_not_whole_are_found(path: str, status: int, answer: bytes) -> None:
    with pytest.raises((AssertionError, ValueError)):
        in_process.check_answer(path, status, answer)
