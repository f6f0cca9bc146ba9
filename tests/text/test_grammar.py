"""Grammars of answers, followed by chance: whatever they let through is read back as what was asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.support import tiny_tokenizers as tiny

from penstock.errors import Kind, PenstockError
from penstock.text import grammar
from penstock.text.assembler import Assembler, Delta
from penstock.text.formats import infer
from penstock.text.parts import TextParts
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer
from penstock.text.tools import tool_format

MARKS = {
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "kimi_k2": [
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ],
    "harmony": ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>"],
    "json_tools": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    "gemma4": ["<|tool_call>", "<tool_call|>"],
    "": [],
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}


def parts(format: str, special: bool = True) -> TextParts:
    """A model of this format; `special`: its marks are control tokens, or else plain ones."""
    backend = tiny.with_special(*MARKS[format]) if special else tiny.byte_level()
    eos = backend.token_to_id("<|im_end|>")
    tokenizer = Tokenizer(backend, {"eos_token": "<|im_end|>"}, frozenset([eos]))
    reasoning, _ = infer(tokenizer, None)
    tools = tool_format(format) if format else None
    return TextParts(tokenizer, ChatTemplate({}), reasoning, tools, {})


def matcher(text: TextParts, rules: str, folder: Path) -> LLMatcher:
    """As the engine makes it, of the tokenizer's file."""
    from penstock.engine.grammar import Grammars

    file = tiny.write_model(folder, text.tokenizer._backend) / "tokenizer.json"
    assert file.is_file()
    made = Grammars(None, folder, text.tokenizer.vocab_size, text.tokenizer.eos_ids)._load()  # type: ignore[arg-type]
    assert isinstance(made, LLTokenizer)
    found = LLMatcher(made, rules)
    assert not found.is_error(), found.get_error()
    return found


def walk(text: TextParts, rules: str, folder: Path, seed: int, first: str = "") -> list[int]:
    """Ids drawn by chance from what the grammar allows, after the text `first`, to the end."""
    at, chance = matcher(text, rules, folder), random.Random(seed)
    ids = list(text.tokenizer.encode(first, add_special_tokens=False))
    assert at.consume_tokens(ids), at.get_error()
    while not at.is_stopped():
        mask = at.compute_bitmask()
        open_ids = [id for id in range(text.tokenizer.vocab_size) if mask[id // 8] >> id % 8 & 1]
        enough = [id for id in open_ids if id in text.tokenizer.eos_ids]
        ids.append(enough[0] if enough and chance.random() < 0.5 else chance.choice(open_ids))
        assert at.consume_token(ids[-1]), at.get_error()
        assert len(ids) < 5000
    return ids


def read(
    text: TextParts, ids: list[int], format: str | None, opened: bool, **options: Any
) -> tuple[Delta, str]:
    tools = None if format is None else grammar.forced(text.tools)
    made = Assembler(text.tokenizer, reasoning=text.reasoning, tools=tools, in_reasoning=opened, **options)
    told, (rest, finish) = made.feed(ids), made.finish("stop")
    calls = told.tool_calls + rest.tool_calls
    return Delta(told.content + rest.content, told.reasoning + rest.reasoning, calls), finish


def right(arguments: str) -> bool:
    value = json.loads(arguments)
    return (
        set(value) in ({"city"}, {"city", "days"}) and len(value["city"]) <= 5 and value.get("days", 0) <= 9
    )


@pytest.mark.parametrize("format", list(MARKS))
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_forced_calls_are_read_back(format: str, special: bool, several: bool, tmp_path: Path) -> None:
    if format == "harmony" and not special:
        return  # its marks are control tokens in every model of the kind
    text = parts(format, special)
    rule = grammar.json_rule(SCHEMA, "x")
    functions = [grammar.Function("get_weather", rule), grammar.Function("a_b-c", rule)]
    rules = grammar.answer(text, None, functions=functions, several=several)
    for seed in range(6):
        said, finish = read(text, walk(text, rules, tmp_path, seed), format, False)
        assert finish == "tool_calls", said
        assert said.content.strip() == ""
        assert (len(said.tool_calls) == 1) or several
        for call in said.tool_calls:
            assert call.name in ("get_weather", "a_b-c")
            assert right(call.arguments)


THOUGHTS = [
    ("json_tools", True, "hm, <x> </thin</think>\n\n", "hm, <x> </thin"),
    ("json_tools", False, "<think>hm</think>", "hm"),
    ("json_tools", False, "", ""),
    ("harmony", False, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant", "hm"),
]


@pytest.mark.parametrize(("format", "opened", "first", "thought"), THOUGHTS)
@pytest.mark.parametrize("special", [True, False])
def test_json_follows_a_thought(
    format: str, opened: bool, first: str, thought: str, special: bool, tmp_path: Path
) -> None:
    if format == "harmony" and not special:
        return  # its marks are control tokens in every model of the kind
    text = parts(format, special)
    rules = grammar.answer(text, opened, schema=grammar.json_rule(SCHEMA, "x"))
    for seed in range(4):
        ids = walk(text, rules, tmp_path, seed, first)
        said, finish = read(text, ids, None, opened, settled=True)
        if not first and said.reasoning:
            continue  # by chance it has opened one itself
        assert finish == "stop"
        assert said.reasoning == thought or (format == "harmony" and said.reasoning.startswith(thought))
        assert right(said.content)


def test_a_thought_cannot_end_the_answer(tmp_path: Path) -> None:
    text = parts("json_tools", special=False)
    at = matcher(text, grammar.answer(text, True, schema=grammar.json_rule({}, "x")), tmp_path)
    for _ in range(3):
        mask = at.compute_bitmask()
        assert not any(mask[id // 8] >> id % 8 & 1 for id in text.tokenizer.eos_ids)
        assert at.consume_tokens(list(text.tokenizer.encode("hm hm", add_special_tokens=False)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"pattern": "["},
        {"$ref": "http://127.0.0.1:9/x"},
        {"$ref": "#"},
        {"multipleOf": 12345.6789},
        {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]},
        {"enum": ["x" * grammar.MAX_GRAMMAR]},
        {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(6)]} for i in range(12)]},
    ],
)
def test_what_cannot_be_enforced_names_its_field(schema: dict[str, Any]) -> None:
    with pytest.raises(PenstockError) as caught:
        grammar.json_rule(schema, "some.field")
    assert (caught.value.kind, caught.value.param) == (Kind.INVALID_FIELD, "some.field")


EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
"""Zod's."""


@pytest.mark.parametrize("regex", [EMAIL, r"\bx", "["])
def test_a_regex_that_cannot_be_enforced_is_ignored_where_nobody_is_strict(regex: str) -> None:
    text = {"type": "string", "pattern": regex}
    told = {"properties": {"pattern": {"type": "integer"}, "a": {"anyOf": [text]}}, "required": ["pattern"]}
    rule = grammar.json_rule(told, "x", strict=False)
    assert json.loads(rule.removeprefix("%json ").replace("x-pattern", "pattern")).items() >= told.items()
    assert rule.count("x-pattern") == 1
    closed = {"patternProperties": {regex: {"type": "integer"}}, "additionalProperties": False, "minItems": 1}
    rule = grammar.json_rule(closed, "x", strict=False)
    assert set(json.loads(rule.removeprefix("%json "))) & set(closed) == {"minItems"}
    with pytest.raises(PenstockError, match=r"not supported|unclosed") as caught:
        grammar.json_rule(told, "x")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_that_ends_its_compiler_ends_nothing_else(strict: bool) -> None:
    """llguidance 1.9.1 dies of SIGSEGV at this one."""
    with pytest.raises(PenstockError, match="its compiler fails"):
        grammar.json_rule({"const": -9223372036854775808}, "schema", strict=strict)
