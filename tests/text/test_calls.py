"""Calls while they are written: parts do not depend on how the text is cut, and never make a call of less."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import tiny_tokenizers as tiny

from penstock.text.assembler import Assembler, Delta
from penstock.text.formats import infer
from penstock.text.tokenizer import Tokenizer
from penstock.text.tools import ToolCall, tool_format

MARKS = [
    *("[TOOL_CALLS]", "[ARGS]", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>"),
]
BACKEND = tiny.with_special(*MARKS)
EOS = BACKEND.token_to_id("<|im_end|>")
TOKENIZER = Tokenizer(BACKEND, {"eos_token": "<|im_end|>"}, frozenset([EOS]))
CHANNELS, _ = infer(TOKENIZER, None)


class Client:
    """What a client of a stream puts together, as the openai package does; what a whole answer holds."""

    def __init__(self) -> None:
        self.content = ""
        self.streamed: list[dict[str, str]] = []
        self.whole: list[ToolCall] = []
        self.finish = ""

    def take(self, delta: Delta) -> None:
        self.content += delta.content
        self.whole += delta.tool_calls
        for part in delta.call_parts:
            if part.id is not None:
                assert part.index == len(self.streamed)
                assert part.name
                self.streamed.append({"id": part.id, "name": part.name, "arguments": ""})
            self.streamed[part.index]["arguments"] += part.arguments

    @property
    def calls(self) -> list[tuple[str, Any]]:
        return [(call["name"], json.loads(call["arguments"])) for call in self.streamed]


def play(
    text: str, format: str = "json_tools", cuts: list[int] | None = None, reason: str = "stop", **options: Any
) -> Client:
    """An answer fed in parts that end at `cuts` (ids), streamed unless said otherwise."""
    ids = list(TOKENIZER.encode(text, add_special_tokens=False))
    marks = CHANNELS if format == "harmony" else None
    options = {"stream_calls": True, "reasoning": marks, "tools": tool_format(format), **options}
    assembler, client = Assembler(TOKENIZER, **options), Client()
    ends = [*sorted(cuts or range(len(ids))), len(ids)]
    for start, end in zip([0, *ends], ends, strict=False):
        client.take(assembler.feed(ids[start:end]))
    rest, client.finish = assembler.finish("cut" if assembler.stopped_at is not None else reason)
    client.take(rest)
    return client


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def written(format: str, calls: list[tuple[str, str]]) -> str:
    """Calls as a model of this format writes them."""
    if format == "mistral":
        return "[TOOL_CALLS]" + "".join(f"{name}[ARGS]{arguments}" for name, arguments in calls)
    if format == "kimi_k2":
        one = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
        inner = "".join(one.format(name, at, arguments) for at, (name, arguments) in enumerate(calls))
        return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"
    if format == "harmony":
        name, arguments = calls[0]
        return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"
    return "\n".join(hermes(name, arguments) for name, arguments in calls)


FORMATS = ["json_tools", "mistral", "kimi_k2", "harmony"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\{}[]é\n,:'), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{", max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text('ab"}', max_size=3), VALUES, max_size=3)


@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.sampled_from(["f", "get_weather"]), ARGUMENTS), min_size=1, max_size=3),
    st.data(),
)
def test_any_cut_of_a_text_gives_the_same_calls(
    format: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    calls = calls[:1] if format == "harmony" else calls
    spelt = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    text = written(format, spelt)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    streamed = play(text, format, cuts)
    whole = play(text, format, cuts, stream_calls=False)
    assert streamed.finish == whole.finish == "tool_calls"
    assert streamed.content.strip() == whole.content.strip() == ""
    assert streamed.calls == calls
    assert whole.streamed == []
    assert [(c.name, json.loads(c.arguments)) for c in whole.whole] == calls
    told = [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in streamed.whole]
    assert told == streamed.streamed, "what is told whole at the end is what was streamed"


@given(st.sampled_from(FORMATS), ARGUMENTS, st.data())
def test_a_cut_call_is_never_a_call(format: str, arguments: dict[str, Any], data: st.DataObject) -> None:
    text = written(format, [("f", json.dumps(arguments))])
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    whole = data.draw(st.integers(0, len(ids) - 1))
    part = BACKEND.decode(list(ids[:whole]), skip_special_tokens=False)
    streamed, kept = (
        play(part, format, reason="length"),
        play(part, format, reason="length", stream_calls=False),
    )
    assert streamed.finish == kept.finish == "length"
    assert not kept.streamed
    if not streamed.whole:
        assert json.dumps(arguments).startswith("".join(c["arguments"] for c in streamed.streamed))
        assert not kept.whole
        if whole and format != "harmony":
            assert kept.content, "a whole answer shows what was cut off"


@pytest.mark.parametrize("arguments", ['{"a": nope}', '{"a": NaN}', '{"a" 1}', '{"a": 1}, "x"'])
def test_what_turns_out_to_be_no_call_goes_out_as_text_and_is_not_called_complete(arguments: str) -> None:
    text = hermes("g", '{"b": 2}') + hermes("f", arguments)
    streamed = play(text)
    assert hermes("f", arguments) in streamed.content
    assert [call.name for call in streamed.whole] == ["g"]
    assert streamed.finish == "stop"
    whole = play(text, stream_calls=False)
    assert (whole.finish, [call.name for call in whole.whole]) == ("tool_calls", ["g"])
    assert hermes("f", arguments) in whole.content


@pytest.mark.parametrize(
    ("format", "inner"),
    [
        ("json_tools", '\n{"arguments": {"a": 1}, "name": "f"}\n'),
        ("json_tools", '{"name": "f", "arguments": "{\\"a\\": 1}"}'),
        ("qwen3_coder", "\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n"),
        ("glm47", "f<arg_key>a</arg_key><arg_value>1</arg_value>"),
    ],
)
def test_what_has_to_be_converted_comes_whole_at_its_end(format: str, inner: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    schemas = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    client = play(f"hm<tool_call>{inner}</tool_call>", format, tool_schemas=schemas)
    assert (client.calls, client.finish, client.content) == ([("f", {"a": 1})], "tool_calls", "hm")


def test_a_name_comes_before_the_arguments_and_arguments_as_they_are_written() -> None:
    ids = TOKENIZER.encode(hermes("f", '{"path": "abcdefghij"}'), add_special_tokens=False)
    assembler = Assembler(TOKENIZER, tools=tool_format("json_tools"), stream_calls=True)
    parts = [part for id_ in ids for part in assembler.feed([id_]).call_parts]
    assert parts[0].name == "f"
    assert len(parts[0].arguments) < 4
    assert sum(bool(part.arguments) for part in parts) > 5


def test_the_first_call_ends_the_answer_where_one_is_wanted() -> None:
    text = hermes("f", '{"a": 1}') + hermes("g", "{}") + "more"
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assembler, client = Assembler(TOKENIZER, tools=tool_format("json_tools"), single_call=True), Client()
    client.take(assembler.feed(ids))
    assert assembler.stopped_at == len(TOKENIZER.encode(hermes("f", '{"a": 1}'), add_special_tokens=False))
    rest, finish = assembler.finish("cut")
    client.take(rest)
    assert ([call.name for call in client.whole], finish, client.content) == (["f"], "tool_calls", "")
    both = play(written("kimi_k2", [("f", "{}"), ("g", "{}")]), "kimi_k2", single_call=True)
    assert ([call.name for call in both.whole], both.calls) == (["f"], [("f", {})])


def test_marks_inside_settled_content_are_its_text() -> None:
    reasoning, _ = infer(Tokenizer(tiny.byte_level(), {}, frozenset([EOS])), None)
    text = '<think>a</think>\n{"x": "<think>b</think><tool_call>"}'
    client = play(text, reasoning=reasoning, settled=True)
    assert client.content == '{"x": "<think>b</think><tool_call>"}'


def test_an_id_that_cannot_come_has_a_number_that_json_knows() -> None:
    told = Assembler(TOKENIZER).feed([65], [0.0], [[(65, 0.0), (66, float("-inf"))]])
    assert [likely.logprob for likely in told.logprobs[0].top_logprobs] == [0.0, -9999.0]
