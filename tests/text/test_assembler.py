from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import tiny_tokenizers as tiny

from penstock.text.assembler import Assembler, Delta, Likely, TokenLogprob
from penstock.text.formats import infer
from penstock.text.tokenizer import Tokenizer
from penstock.text.tools import ToolCall, tool_format

TOKENIZER = Tokenizer(
    tiny.byte_level(), {"eos_token": "<|im_end|>"}, frozenset([tiny.byte_level().token_to_id("<|im_end|>")])
)
EOS = next(iter(TOKENIZER.eos_ids))
REASONING, _ = infer(TOKENIZER, None)
JSON_TOOLS = tool_format("json_tools")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@dataclass
class Answer:
    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stopped_at: int | None = None
    finish: str = ""

    def take(self, delta: Delta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        self.calls += delta.tool_calls
        self.logprobs += delta.logprobs


def assemble(
    parts: Iterable[list[int]], reason: str = "stop", tokenizer: Tokenizer = TOKENIZER, **options: Any
) -> Answer:
    assembler, answer = Assembler(tokenizer, **options), Answer()
    for ids in parts:
        answer.take(assembler.feed(ids))
    delta, answer.finish = assembler.finish(reason)
    answer.take(delta)
    answer.stopped_at = assembler.stopped_at
    return answer


def ids_of(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def letters(text: str) -> list[list[int]]:
    """The text as one id a character, so that every mark is cut everywhere."""
    return [[id] for letter in text for id in ids_of(letter)]


def both(text: str, reason: str = "stop", **options: Any) -> Answer:
    """The answer, checked to be the same for the tokenizer's ids and for single characters."""
    whole, cut = assemble([ids_of(text)], reason, **options), assemble(letters(text), reason, **options)
    for one, other in zip(whole.calls, cut.calls, strict=True):
        assert (one.index, one.name, one.arguments) == (other.index, other.name, other.arguments)
    assert (whole.content, whole.reasoning, whole.finish) == (cut.content, cut.reasoning, cut.finish)
    return cut


def test_plain_text_goes_out_at_once_and_the_end_of_turn_is_no_text() -> None:
    assembler = Assembler(TOKENIZER)
    for id in ids_of("The quick brown fox. "):
        assert assembler.feed([id]).content == TOKENIZER.decode([id])
    assert not assembler.feed([EOS])
    assert assembler.finish("stop") == (Delta(), "stop")


def test_reason_length_and_an_incomplete_character() -> None:
    answer = assemble([[id] for id in ids_of("ok🦊")[:-1]], "length")
    assert (answer.content, answer.finish) == ("ok\ufffd", "length")


# Stop strings


def test_a_stop_string_over_several_ids() -> None:
    ids = [id for letter in "one END two" for id in ids_of(letter)]
    assembler = Assembler(TOKENIZER, stops=["END"])
    said = [assembler.feed([id]).content for id in ids]
    assert said == ["o", "n", "e", " ", "", "", "", "", "", "", ""]
    assert assembler.stopped_at == 7
    assert assembler.finish("cut") == (Delta(), "stop")


def test_a_stop_within_a_part_counts_ids_up_to_the_match() -> None:
    ids = [id for letter in "ab.cd" for id in ids_of(letter)]
    answer = assemble([ids], "cut", stops=["."])
    assert (answer.content, answer.stopped_at) == ("ab", 3)


def test_what_looked_like_a_stop_is_let_out() -> None:
    answer = both("one EN", stops=["END"])
    assert (answer.content, answer.stopped_at) == ("one EN", None)
    assert both("ENENEND!", "cut", stops=["END"]).content == "ENEN"


def test_the_first_of_several_stops_wins() -> None:
    assert both("a stop b halt", "cut", stops=["halt", "stop"]).content == "a "


def test_a_stop_in_reasoning_counts_too() -> None:
    answer = both("<think>hmm STOP</think>yes", "cut", stops=["STOP"], reasoning=REASONING)
    assert (answer.content, answer.reasoning, answer.finish) == ("", "hmm ", "stop")


def test_a_stop_may_name_a_mark_or_a_special_token() -> None:
    assert (
        both("so</think>yes", "cut", stops=["</think>"], reasoning=REASONING, in_reasoning=True).reasoning
        == "so"
    )
    secret = TOKENIZER.id_of("<|secret|>")
    answer = assemble([ids_of("a"), [secret], ids_of("b")], "cut", stops=["<|secret|>"])
    assert (answer.content, answer.stopped_at) == ("a", 2)
    assert assemble([ids_of("a"), [secret], ids_of("b")]).content == "ab"


def test_a_stop_completed_by_the_last_id_is_no_length() -> None:
    assert assemble([ids_of("ab.")], "length", stops=["."]).finish == "stop"


@given(
    st.text("ab\nSTOP", max_size=40),
    st.lists(st.text("ab\nSTOP", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_stops_do_not_depend_on_the_parts(text: str, stops: list[str], data: st.DataObject) -> None:
    ids = ids_of(text)
    parts, at = [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, 4))
        parts.append(ids[at : at + size])
        at += size
    answer, whole = assemble(parts, stops=stops), assemble([ids], stops=stops)
    assert (answer.content, answer.stopped_at) == (whole.content, whole.stopped_at)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (answer.content, answer.stopped_at) == (text, None)
        return
    assert answer.stopped_at is not None
    kept = len(TOKENIZER.decode(ids[: answer.stopped_at]))
    assert len(TOKENIZER.decode(ids[: answer.stopped_at - 1])) < min(ends) <= kept
    assert text.startswith(answer.content)
    assert not any(stop in answer.content for stop in stops)


# Reasoning


def test_reasoning_stands_apart_without_the_white_space_of_its_marks() -> None:
    answer = both("<think>\nLet me see.\n\nYes.\n</think>\n\nIt is so.\n", reasoning=REASONING)
    assert (answer.reasoning, answer.content) == ("Let me see.\n\nYes.", "It is so.\n")


def test_a_block_that_the_template_opened() -> None:
    answer = both("Hm.</think>Yes", reasoning=REASONING, in_reasoning=True)
    assert (answer.reasoning, answer.content) == ("Hm.", "Yes")


def test_reasoning_that_the_length_cuts_off() -> None:
    answer = both("Hm. </thi", "length", reasoning=REASONING, in_reasoning=True)
    assert (answer.reasoning, answer.content, answer.finish) == ("Hm. </thi", "", "length")


def test_content_before_reasoning_and_an_empty_block() -> None:
    answer = both("A <think>b</think> c", reasoning=REASONING)
    assert (answer.content, answer.reasoning) == ("Ac", "b")
    answer = both("<think>\n\n</think>\n\nc", reasoning=REASONING)
    assert (answer.content, answer.reasoning) == ("c", "")


def test_without_marks_all_is_content() -> None:
    text = "  <think>b</think>\n" + CALL
    assert both(text).content == text


def test_reasoning_streams() -> None:
    assembler = Assembler(TOKENIZER, reasoning=REASONING, in_reasoning=True)
    assert [assembler.feed([id]).reasoning for id in ids_of("fox day")] == [
        TOKENIZER.decode([id]) for id in ids_of("fox day")
    ]


# Tool calls


def test_calls_come_whole_at_their_end_with_the_text_between() -> None:
    answer = both(f"Sure.\n{CALL}\nand\n{CALL.replace('1', '2')}", tools=JSON_TOOLS)
    assert answer.content == "Sure.and"
    assert [(call.index, call.name, call.arguments) for call in answer.calls] == [
        (0, "f", '{"a": 1}'),
        (1, "f", '{"a": 2}'),
    ]
    assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) for call in answer.calls)
    assert answer.finish == "tool_calls"


def test_a_call_after_reasoning_leaves_no_white_space_behind() -> None:
    answer = both(f"<think>\nhm\n</think>\n\n{CALL}", reasoning=REASONING, tools=JSON_TOOLS)
    assert (answer.content, answer.reasoning, len(answer.calls)) == ("", "hm", 1)


@pytest.mark.parametrize(
    "inner",
    [
        "not json",
        "[]",
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"arguments": {}}',
        "[" * 100_000,
    ],
)
def test_a_call_that_cannot_be_read_is_shown(inner: str) -> None:
    text = f"See: <tool_call>{inner}</tool_call> end"
    answer = assemble([ids_of(text)], tools=JSON_TOOLS)
    assert (answer.content, answer.calls, answer.finish) == (text, [], "stop")


def test_a_call_that_is_cut_off_is_shown() -> None:
    text = 'So: <tool_call>{"name": "f", "arguments": {}}</tool_'
    answer = both(text, "length", tools=JSON_TOOLS)
    assert (answer.content, answer.calls, answer.finish) == (text, [], "length")
    answer = both(text + "X", "cut", tools=JSON_TOOLS, stops=["X"])
    assert (answer.content, answer.calls, answer.finish) == (text, [], "stop")


def test_a_call_whose_end_mark_is_missing_counts_if_the_model_ended() -> None:
    answer = both('<tool_call>{"name": "f", "arguments": {}}', tools=JSON_TOOLS)
    assert (answer.content, len(answer.calls), answer.finish) == ("", 1, "tool_calls")


def test_a_read_call_before_the_length_ends_is_still_length() -> None:
    answer = both(f"{CALL} and", "length", tools=JSON_TOOLS)
    assert (len(answer.calls), answer.content, answer.finish) == (1, "and", "length")


def test_an_unreadable_call_in_reasoning_stays_there() -> None:
    answer = both(
        "I may write <tool_call> here</tool_call> so</think>ok",
        reasoning=REASONING,
        tools=JSON_TOOLS,
        in_reasoning=True,
    )
    assert answer.reasoning == "I may write <tool_call> here</tool_call> so"
    assert answer.content == "ok"


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '"{\\"a\\": 1}"', '""', "null", '{"ä": "日本"}'])
def test_arguments_are_always_json_text_of_an_object(arguments: str) -> None:
    text = '<tool_call>{"name": "f", "arguments": ARGUMENTS}</tool_call>'.replace("ARGUMENTS", arguments)
    answer = both(text, tools=JSON_TOOLS)
    (call,) = answer.calls
    call.arguments.encode()
    assert isinstance(json.loads(call.arguments), dict)


def test_several_calls_in_one_pair_of_marks_and_the_models_own_ids() -> None:
    backend = tiny.with_special(
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        *("<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"),
    )
    tokenizer = Tokenizer(backend, {}, frozenset())
    calls = "".join(
        f'<|tool_call_begin|>functions.f:{n}<|tool_call_argument_begin|>{{"n": {n}}}<|tool_call_end|>'
        for n in range(2)
    )
    text = f"Now<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"
    answer = assemble(
        [[id] for id in ids_of(text, tokenizer)], tokenizer=tokenizer, tools=tool_format("kimi_k2")
    )
    assert [(call.index, call.id, call.arguments) for call in answer.calls] == [
        (0, "functions.f:0", '{"n": 0}'),
        (1, "functions.f:1", '{"n": 1}'),
    ]
    assert answer.content == "Now"
    shown = assemble([[id] for id in ids_of(text, tokenizer)], "length", tokenizer=tokenizer)
    assert "<|" not in shown.content, "special tokens are no text where nobody looks for them"


def test_types_of_arguments_come_from_the_tools() -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"n": {"type": "string"}}}},
        }
    ]
    text = "<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
    typed = both(
        text, tools=tool_format("qwen3_coder"), tool_schemas=[*tools, "junk", {"function": {"name": None}}]
    )
    assert typed.calls[0].arguments == '{"n": "3"}'


# Formats of messages with headers


def harmony() -> Tokenizer:
    backend = tiny.with_special(
        "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
    )
    return Tokenizer(backend, {}, frozenset(backend.token_to_id(name) for name in ("<|call|>", "<|return|>")))


def test_channels_become_reasoning_content_and_calls() -> None:
    tokenizer = harmony()
    reasoning, tools = infer(tokenizer, "")
    head = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    options: dict[str, Any] = {"tokenizer": tokenizer, "reasoning": reasoning, "tools": tools}
    answer = assemble(
        [
            [id]
            for id in ids_of(f"{head}<|channel|>final<|message|>It goes to=functions.x!<|return|>", tokenizer)
        ],
        **options,
    )
    assert (answer.reasoning, answer.content, answer.finish) == ("Hm.", "It goes to=functions.x!", "stop")
    for call in (
        "<|channel|>commentary to=functions.f <|constrain|>json",
        " to=functions.f<|channel|>commentary json",
    ):
        text = f'{head}{call}<|message|>{{"a": 1}}<|call|>'
        answer = assemble([[id] for id in ids_of(text, tokenizer)], **options)
        assert [(made.name, made.arguments) for made in answer.calls] == [("f", '{"a": 1}')]
        assert (answer.reasoning, answer.content, answer.finish) == ("Hm.", "", "tool_calls")


def test_an_answer_without_any_header_is_shown() -> None:
    tokenizer = harmony()
    reasoning, tools = infer(tokenizer, "")
    answer = assemble([ids_of("just text", tokenizer)], tokenizer=tokenizer, reasoning=reasoning, tools=tools)
    assert answer.content == "just text"


def test_marks_of_several_tokens() -> None:
    backend = tiny.with_special("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
    tokenizer = Tokenizer(backend, {}, frozenset())
    reasoning, tools = infer(tokenizer, "")
    assert tools is not None
    assert tools.name == "kimi_k3"
    text = (
        "<|open|>think<|sep|>Hm<|close|>think<|sep|><|open|>response<|sep|>Yes<|close|>response<|sep|>"
        '<|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|>'
        '<|open|>argument key="a" type="number"<|sep|>1'
        "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>"
    )
    answer = assemble(
        [[id] for id in ids_of(text, tokenizer)], tokenizer=tokenizer, reasoning=reasoning, tools=tools
    )
    assert (answer.reasoning, answer.content) == ("Hm", "Yes")
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"a": 1}')]


# Log-probabilities and the whole


def test_log_probabilities_of_every_id_that_counts() -> None:
    ids = [*ids_of("a🦊"), EOS]
    top = [[(id, -0.5), (5, -2.0)] for id in ids]
    assembler = Assembler(TOKENIZER)
    found = assembler.feed(ids, [-0.5] * len(ids), top).logprobs
    assert bytes(byte for entry in found for byte in entry.bytes).decode() == "a🦊"
    assert found[0].token == "a"
    assert found[1].token == "\ufffd"
    assert found[0].top_logprobs[0] == Likely("a", -0.5, [97])


@given(
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "<tool_call>",
                "</tool_call>",
                "\n",
                " ",
                "b",
                "fox",
                '{"name": "f"}',
                "<",
                "🦊",
            ]
        ),
        max_size=14,
    ),
    st.booleans(),
)
def test_nothing_vanishes(words: list[str], in_reasoning: bool) -> None:
    text = "".join(words)
    answer = both(text, "length", reasoning=REASONING, tools=JSON_TOOLS, in_reasoning=in_reasoning)
    shown = re.sub(r"\s", "", answer.content + answer.reasoning)
    for word in ("b", "fox", "🦊"):  # none of them part of a call
        assert shown.count(word) >= text.count(word)
    assert shown.count('"f"') + len(answer.calls) == text.count('"f"')
