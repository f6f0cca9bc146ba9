"""What a constrained answer may look like: from a request's words to a grammar in llguidance's form of Lark.

Owns the shape of a whole answer: a thought first, as the model's own marks have it, then JSON of a schema or
calls of functions. Refuses, by field, what is too large, what does not compile, and what is known to compile
without end. Pure text and llguidance; what follows a grammar is the engine's. Invariant: an answer that a
grammar made here calls complete is read back by the assembler as what was asked for.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from penstock.errors import Kind, PenstockError
from penstock.platform import PYTHON
from penstock.text.formats import CONTENT, HEADER
from penstock.text.parts import TextParts
from penstock.text.tokenizer import Tokenizer
from penstock.text.tools import ToolFormat, tool_format
from penstock.wire import GRAMMAR_LIMITS

MAX_GRAMMAR = 256 << 10
"""Characters of a grammar; one of an agent's tools takes some tens of thousands."""
MOST_MULTIPLES = 1_000_000
"""The product of all `multipleOf`, in units of their last digits: each remainder is a state."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}

_OPTIONS = {"whitespace_pattern": r"[ \t\r\n]{0,32}", "coerce_one_of": True}
"""Without a bound a weak model writes white space until its tokens end."""
_CALLS = {
    "json_tools": '<tool_call>\n{"name": "%name%", "arguments": %arguments%}\n</tool_call>',
    "mistral": "[TOOL_CALLS]%name%[ARGS]%arguments%",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.%name%:%index%"
    "<|tool_call_argument_begin|>%arguments%<|tool_call_end|><|tool_calls_section_end|>",
    "harmony": "<|channel|>commentary to=functions.%name% <|constrain|>json<|message|>%arguments%",
}
"""How calls are written in the formats that hold arguments as JSON; for all others see `forced`."""
_CHECK = """
import json, llguidance, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
limits, grammar = llguidance.LLParserLimits(**json.loads(sys.argv[1])), sys.stdin.buffer.read().decode()
matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=limits)
matcher.compute_bitmask()
sys.stdout.buffer.write(matcher.get_error().encode())
"""
"""A matcher of single bytes, since what no text fits compiles, and fails in the first mask."""
_ENDS_ANSWER = ("harmony",)
"""Formats whose call is the answer's end, so there is one."""
_PLACES = re.compile("%(name|arguments|index)%")
_IGNORED = (r'"(pattern": ")', r'"(patternProperties": {|additionalProperties": false)')
"""In a schema's text, what is ignored for a regex that can't be enforced: patterns, then those of names.

A `pattern` that is no string is a property.
"""
_REST = r"""
SPACE: /[ \t\r\n]{1,16}/
TEXT: /(.|\n)+/
INDEX: /[0-9]{1,2}/
"""


@dataclass(frozen=True)
class Function:
    """A function that may be called, and its arguments as `json_rule` has them."""

    name: str
    arguments: str


def json_rule(schema: Any, param: str, *, strict: bool = True) -> str:
    """JSON of this schema, which came in field `param`, checked. Slow where it is large: for the pool.

    Not strict: keywords that can't be enforced are ignored, all patterns for one. Raises INVALID_FIELD.
    """
    if math.prod(_multiples(schema)) > MOST_MULTIPLES:
        raise invalid(param, "multipleOf is too fine to be enforced.")
    options = {**_OPTIONS, "lenient": not strict}
    rule = "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
    if len(rule) > MAX_GRAMMAR:
        raise invalid(param, f"a schema of {len(rule):,} characters is more than {MAX_GRAMMAR:,}.")
    try:
        problem = _problem(f"start: {rule}")
        for keywords in () if strict else _IGNORED:
            if "regex" in problem:
                rule = re.sub(keywords, r'"x-\1', rule)
                problem = _problem(f"start: {rule}")
    except subprocess.SubprocessError:
        problem = "its compiler fails"
    if problem:
        raise invalid(param, f"this schema can't be enforced: {problem}.")
    return rule


def answer(
    text: TextParts,
    opened: bool | None,
    *,
    schema: str | None = None,
    functions: Sequence[Function] = (),
    several: bool = True,
) -> str:
    """The grammar of an answer: a thought, then JSON (`schema`: its rule) or calls of some of `functions`.

    `opened`: the prompt has opened the thought; None: there is to be none. Raises INVALID_FIELD.
    """
    lark = _Lark(text.tokenizer)
    bodies = [] if schema is None else [f"{_header(text, lark)} {schema}"]
    if functions:
        bodies.append(_calls(forced(text.tools), functions, several, lark))
    thought = "" if opened is None else _thought(text, opened, lark)
    lark.rules.append(f"start: {thought} ({' | '.join(bodies)})")
    grammar = "\n".join(lark.rules) + _REST
    if len(grammar) > MAX_GRAMMAR:
        raise invalid("tools", f"their schemas have more than {MAX_GRAMMAR:,} characters.")
    return grammar


def forced(tools: ToolFormat | None) -> ToolFormat:
    """The format that calls are forced into: the model's own, if its arguments are JSON, or else Hermes'."""
    return tools if tools is not None and tools.name in _CALLS else tool_format("json_tools")


def _calls(tools: ToolFormat, functions: Sequence[Function], several: bool, lark: _Lark) -> str:
    ways = []
    for function in functions:
        parts = _PLACES.split(_CALLS[tools.name])
        inserted = {"name": lark.literal(function.name), "arguments": function.arguments, "index": "INDEX"}
        words = (inserted[part] if at % 2 else lark.literal(part) for at, part in enumerate(parts))
        ways.append(" ".join(words))
    lark.rules.append(f"call: {' | '.join(ways)}")
    return "call (SPACE? call)*" if several and tools.name not in _ENDS_ANSWER else "call"


def _header(text: TextParts, lark: _Lark) -> str:
    """What stands before plain content, in formats whose messages have headers."""
    marks = text.reasoning
    if marks is None or marks.initial != HEADER:
        return ""
    return lark.literal(next(mark for mark, state in marks.edges[HEADER].items() if state == CONTENT))


def _thought(text: TextParts, opened: bool, lark: _Lark) -> str:
    marks = text.reasoning
    if marks is None:
        return ""
    start, rest = lark.literal(marks.start), lark.until(marks.end)
    if marks.initial == HEADER:
        return f"({start} {rest} {lark.literal(marks.resumed)})*" if marks.resumed else ""
    dropped = [lark.literal(mark) for mark, state in marks.edges.get(CONTENT, {}).items() if state == CONTENT]
    behind = f"SPACE? ({' | '.join(dropped)})?" if dropped else "SPACE?"
    return f"{rest} {behind}" if opened else f"({start} {rest} SPACE?)? {behind}"


class _Lark:
    """Words of a grammar: special tokens by id, since their names are no text, and all else as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._ids = {tokenizer.token_bytes(id_).decode(): id_ for id_ in tokenizer.special_ids}
        names = sorted(filter(None, self._ids), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "((?!))")
        self.rules: list[str] = []

    def literal(self, text: str) -> str:
        """This text and no other."""
        parts = [part for part in self._special.split(text) if part]
        return " ".join(f"<[{self._ids[part]}]>" if part in self._ids else _quoted(part) for part in parts)

    def until(self, mark: str) -> str:
        """Any text up to the first `mark`, and that."""
        if self._special.match(mark):
            return f"TEXT? {self.literal(mark)}"
        self.rules.append(f"until[suffix={_quoted(mark)}]: " + r"/(.|\n)*/")
        return "until"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _multiples(schema: Any) -> Iterable[int]:
    """All `multipleOf` in a schema, as whole numbers of their last digit: 0.25 is 25."""
    if isinstance(schema, dict):
        value = schema.get("multipleOf")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            digits = Decimal(repr(value)).normalize().as_tuple().digits
            yield int("".join(map(str, digits)))
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            yield from _multiples(inner)


@lru_cache(64)
def _problem(grammar: str) -> str:
    """What the compiler finds wrong, in a process of its own: it is native code, and some schema ends it.

    Raises subprocess.SubprocessError then, and that is not remembered: a crowded machine may be why.
    """
    command = [*PYTHON, "-c", _CHECK, json.dumps(GRAMMAR_LIMITS)]
    asked = grammar.encode(errors="replace")
    done = subprocess.run(command, input=asked, capture_output=True, timeout=20, check=True)
    told = done.stdout.decode().partition("\n   1 | ")[0].replace("NoExtensionBias", "no text fits it")
    return " ".join(re.sub(r"(?m)^(at \d+\(\d+\):| +[\^ ]+$|<non-verbose/>)", "", told).split())[:1000]


def invalid(param: str, message: str) -> PenstockError:
    return PenstockError(Kind.INVALID_FIELD, f"{param}: {message}", param=param)
