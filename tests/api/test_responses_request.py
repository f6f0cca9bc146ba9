"""Laws of the Responses API's conversion and of its events, without a server."""

from __future__ import annotations

import json
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import wire
from penstock.api import responses_request
from penstock.api.body import decode
from penstock.api.generation import Piece, Plan
from penstock.api.responses import ResponsesRenderer
from penstock.api.responses_request import ResponsesRequest
from penstock.errors import Kind, PenstockError
from penstock.supervisor.ticket import Job
from penstock.text.assembler import Assembler, Delta
from penstock.text.tools import ToolCall

Json = dict[str, Any]

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
WORDS = st.text("ab\n", min_size=1, max_size=4)
ARGUMENTS = st.dictionaries(st.sampled_from("xy"), WORDS, max_size=2).map(json.dumps)


def read(body: Json) -> tuple[Json, ResponsesRequest]:
    return decode(msgspec.json.encode(body), ResponsesRequest)


def chat(**body: Any) -> Json:
    """The chat request that says the same."""
    return responses_request.as_chat(*read({"input": "hi", **body}))[0]


def messages(*items: Json, **body: Any) -> list[Json]:
    return chat(input=list(items), **body)["messages"]  # type: ignore[no-any-return]


def renderer(**body: Any) -> ResponsesRenderer:
    raw, request = read({"input": "hi", **body})
    job = Job(array("I", [1]), wire.Sampling())

    def assembler() -> Assembler:
        raise AssertionError("not asked for")

    echo = responses_request.echo(raw, request)
    return ResponsesRenderer("1", "m", Plan([job], assembler, True, False, False, echo=echo))


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """What a generation says, in the order that models say it: thoughts, words, calls."""
    deltas = [Delta(reasoning=text) for text in draw(st.lists(WORDS, max_size=3))]
    deltas += [Delta(content=text) for text in draw(st.lists(WORDS, max_size=3))]
    arguments = draw(st.lists(ARGUMENTS, max_size=3))
    calls = [ToolCall(at, f"call_{at}", "read", text) for at, text in enumerate(arguments)]
    return deltas + [Delta(tool_calls=[call]) for call in calls]


ANY_ORDER = st.lists(
    st.one_of(
        WORDS.map(lambda text: Delta(reasoning=text)),
        WORDS.map(lambda text: Delta(content=text)),
        st.tuples(WORDS, WORDS).map(lambda both: Delta(reasoning=both[0], content=both[1])),
        ARGUMENTS.map(lambda text: Delta(tool_calls=[ToolCall(0, "call_1", "read", text)])),
    ),
    max_size=8,
)


def play(deltas: list[Delta], reason: str, **body: Any) -> list[Json]:
    """The events of a stream."""
    words = renderer(**body)
    data = words.opening() + b"".join(words.piece(Piece(0, [delta])) for delta in deltas)
    data += words.keepalive() + words.piece(Piece(0, [], reason)) + words.ending(USAGE)
    return [json.loads(block.split(b"\ndata: ")[1]) for block in data.strip().split(b"\n\n")]


@given(ANY_ORDER, st.sampled_from(["stop", "length", "tool_calls"]))
def test_items_open_and_close_one_at_a_time_and_deltas_add_up(deltas: list[Delta], reason: str) -> None:
    got = play(deltas, reason)
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    final = got[-1]["response"]
    opened: Json | None = None
    texts: dict[int, str] = {}
    for event in got:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert opened is None
            assert event["output_index"] == len(texts)
            opened = event["item"]
            texts[len(texts)] = ""
        elif "output_index" in event:
            assert opened is not None
            assert event["output_index"] == len(texts) - 1
            assert event.get("item_id", opened["id"]) == opened["id"]
            if kind.endswith(".delta"):
                texts[len(texts) - 1] += event["delta"]
            elif kind == "output_item.done":
                assert event["item"] == final["output"][len(texts) - 1]
                opened = None
    assert opened is None
    assert len(texts) == len(final["output"])
    for text, item in zip(texts.values(), final["output"], strict=True):
        assert text == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    assert "".join(texts.values()) == "".join(
        d.reasoning + d.content + "".join(call.arguments for call in d.tool_calls) for d in deltas
    )
    assert got[-1]["type"] == ("response.incomplete" if reason == "length" else "response.completed")


@given(ANY_ORDER, st.sampled_from(["stop", "length"]))
def test_the_answer_without_streaming_is_the_last_events_response(deltas: list[Delta], reason: str) -> None:
    words = renderer()
    held = sum(words.collect(Piece(0, [delta])) for delta in deltas)
    words.collect(Piece(0, [], reason))
    whole = words.whole(USAGE)
    last = play(deltas, reason)[-1]["response"]
    assert {**whole, "created_at": 0} == {**last, "created_at": 0}
    assert held >= sum(len(delta.content) + len(delta.reasoning) for delta in deltas)


@given(answers(), st.booleans())
def test_an_answers_items_sent_back_are_one_turn(deltas: list[Delta], encrypted: bool) -> None:
    include = ["reasoning.encrypted_content"] if encrypted else []
    items = play(deltas, "stop", include=include)[-1]["response"]["output"]
    if encrypted:
        items = [{k: v for k, v in i.items() if i["type"] != "reasoning" or k != "content"} for i in items]
    ask, result = {"role": "user", "content": "go"}, {"type": "function_call_output", "call_id": "call_0"}
    turns = messages(ask, *items, {**result, "output": "done"})
    assert [turn["role"] for turn in turns] == ["user", *(["assistant"] if items else []), "tool"]
    if items:
        turn = turns[1]
        assert turn.get("reasoning_content", "") == "".join(delta.reasoning for delta in deltas)
        assert turn.get("content", "") == "".join(delta.content for delta in deltas)
        calls = [call.arguments for delta in deltas for call in delta.tool_calls]
        assert [call["function"]["arguments"] for call in turn.get("tool_calls", [])] == calls


ITEMS = st.lists(
    st.sampled_from(
        [
            {"role": "user", "content": "a"},
            {"role": "developer", "content": [{"type": "input_text", "text": "b"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "d"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "e"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "g"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "h"}]},
            {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
            {"type": "tool_search_call", "call_id": "2", "arguments": {"query": "a"}},
            {"type": "shell_call_output", "call_id": "3", "output": [{"stdout": "a", "outcome": {}}]},
            {"type": "computer_call_output", "call_id": "4", "output": {"type": "computer_screenshot"}},
        ]
    ),
    min_size=1,
    max_size=8,
)


@given(ITEMS, ITEMS)
def test_more_items_leave_the_turns_before_as_they_are(before: list[Json], after: list[Json]) -> None:
    boundary: Json = {"role": "user", "content": "|"}  # the client speaks after an answer
    early = messages(*before, boundary)
    assert messages(*before, boundary, *after)[: len(early)] == early


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "message", "user", "reasoning"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "role", "content", "text", "output", "name", "tools", "summary", "arguments"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["input", "tools", "tool_choice", "text", "reasoning", "include", "instructions"]),
        JUNK,
    )
)
def test_whatever_comes_is_a_chat_request_or_a_400(body: Json) -> None:
    error = fault({"input": "hi", **body})
    if error is not None:
        assert error.kind in (Kind.INVALID_FIELD, Kind.UNSUPPORTED_FIELD)
        assert error.param is None or error.param.split(".")[0].split("[")[0] in {*body, "input"}


def fault(body: Json) -> PenstockError | None:
    """Why a body is refused, if it is."""
    try:
        raw, request = read(body)
        _, asked = responses_request.as_chat(raw, request)
        responses_request.echo(raw, request)
    except PenstockError as error:
        return error
    assert asked.messages
    return None


def test_two_messages_in_a_row_are_two_turns_and_calls_go_on_with_the_last() -> None:
    said = {"type": "message", "role": "assistant", "content": "a"}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    turns = messages({"role": "user", "content": "go"}, said, said, call, call)
    assert [(turn["role"], len(turn.get("tool_calls", []))) for turn in turns] == [
        ("user", 0),
        ("assistant", 0),
        ("assistant", 2),
    ]


def test_reasoning_that_another_server_has_encrypted_is_left_out() -> None:
    other = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAAB"}
    ours = {"type": "reasoning", "summary": [], "encrypted_content": "plain:hm"}
    assert messages({"role": "user", "content": "go"}, other) == [{"role": "user", "content": "go"}]
    assert messages({"role": "user", "content": "go"}, ours)[1]["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (None, None),
        ({"type": "text"}, {"type": "text"}),
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}},
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": {"type": "object"}},
            },
        ),
    ],
)
def test_the_format_of_text_is_chats_response_format(given: Json | None, passed: Json | None) -> None:
    assert chat(text={"format": given})["response_format"] == passed


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (None, None),
        ("required", "required"),
        ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_the_choice_of_a_tool_is_chats(given: Any, passed: Any) -> None:
    assert chat(tool_choice=given)["tool_choice"] == passed


def test_tools_are_chats_and_what_runs_elsewhere_is_left_out() -> None:
    read_ = {"type": "function", "name": "read", "description": "d", "strict": False, "parameters": None}
    tools = [read_, {"type": "custom", "name": "patch", "format": {}}, {**read_, "name": "w", "strict": True}]
    plain = {"description": "d", "parameters": {"type": "object"}}
    assert [tool["function"] for tool in chat(tools=tools)["tools"]] == [
        {"name": "read", **plain},
        {"name": "w", **plain, "strict": True},
    ]
    assert chat(tools=tools[1:2])["tools"] is None
    space = {"type": "namespace", "name": "n", "tools": [{"type": "foo", "parameters": "x"}, read_]}
    (function,) = chat(tools=[{"type": "foo", "parameters": "x", "name": {}}, space])["tools"]
    assert function["function"] == {"name": "n__read", **plain}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [{"type": "function_call", "name": "f", "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{"type": "x", "content": 5}, {"role": "user", "content": 5}]}, "input[1].content"),
        ({"input": [{"type": ["x"]}]}, "input[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "parameters": "x"}]}, "tools[0].parameters"),
    ],
)
def test_what_is_read_here_is_of_its_types(body: Json, param: str) -> None:
    error = fault({"input": "hi", **body})
    assert error is not None
    assert error.param == param
