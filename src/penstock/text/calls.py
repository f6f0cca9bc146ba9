"""Tool calls while they are written: the name first, then the arguments' text as it comes.

Owns the way from the text of an open call to its parts, for formats whose arguments are JSON in place.
Refuses to judge: whether it was a call is known at its end, from its parser. Pure. Invariant: the parts of a
call, joined, are its arguments as the model wrote them, however the text was cut.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, replace

from penstock.text.tools import ToolCall

LONGEST_HEAD = 4096
"""Characters in which a call must have said its name; else it is kept whole."""

_JSON = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_HEADS = {
    "json_tools": _JSON,
    "longcat": _JSON,
    "mistral": re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*(?P<name>[\w-]+)\s*\[ARGS\]\s*(?=\{)"),
    "kimi_k2": re.compile(
        r"\s*(?:<\|tool_call_end\|>)?\s*<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>.+?):\d+)"
        r"\s*<\|tool_call_argument_begin\|>\s*(?=\{)"
    ),
    "harmony": re.compile(r"(?P<name>[\w.-]+)(?:(?!<\|message\|>).)*<\|message\|>\s*(?=\{)", re.DOTALL),
}
_OUTSIDE = re.compile(r'["{}\[\]]')
_QUOTED = re.compile(r'"|\\.?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of call number `index`: its id and name come with the first, arguments with any."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class OpenCall:
    """The text between a call's marks, in parts; `begun` are the calls that have said their names."""

    def __init__(self, format: str, index: int, *, single: bool = False) -> None:
        """`index`: the number of the first call in it; `single`: no other counts."""
        self.begun: list[ToolCall] = []
        self._head = _HEADS.get(format)
        self._first, self._single = index, single
        self._rest = ""
        self._depth = 0
        self._quoted = False

    def push(self, text: str) -> list[CallPart]:
        """More text; what is certain of it."""
        parts: list[CallPart] = []
        self._rest += text
        while self._depth or self._heard(parts):
            end, call = self._scan(), self.begun[-1]
            written, self._rest = self._rest[:end], self._rest[end:]
            self.begun[-1] = replace(call, arguments=call.arguments + written)
            if written:
                parts.append(CallPart(call.index, written))
            if self._depth:
                break
        return parts

    def _heard(self, parts: list[CallPart]) -> bool:
        """Whether the next call has said its name by now."""
        if self._single and self.begun:
            return False
        head = self._head.match(self._rest) if self._head else None
        if head is None or head.end() > LONGEST_HEAD:
            if len(self._rest) > LONGEST_HEAD + 1:
                self._head = None
            return False
        id_ = head.groupdict().get("id") or f"call_{secrets.token_hex(12)}"
        call = ToolCall(self._first + len(self.begun), id_, head["name"], "")
        self.begun.append(call)
        parts.append(CallPart(call.index, "", call.id, call.name))
        self._rest = self._rest[head.end() :]
        return True

    def confirmed(self, parsed: list[ToolCall]) -> list[ToolCall] | None:
        """The calls as they were begun, and those that were not; None if others are meant than were begun."""
        for at, was in enumerate(self.begun):
            try:
                meant, written = json.loads(parsed[at].arguments), json.loads(was.arguments)
            except (IndexError, ValueError):
                return None
            if (parsed[at].name, meant) != (was.name, written):
                return None
        return [*self.begun, *parsed[len(self.begun) :]]

    def _scan(self) -> int:
        """How far the arguments go in what is left; an escape that is cut in two waits."""
        at = 0
        while match := (_QUOTED if self._quoted else _OUTSIDE).search(self._rest, at):
            at, sign = match.end(), match[0]
            if sign == "\\":
                return match.start()
            if sign == '"':
                self._quoted = not self._quoted
            elif sign[0] != "\\":
                self._depth += 1 if sign in "{[" else -1
                if self._depth == 0:
                    return at
        return len(self._rest)


def append(parts: list[CallPart], more: list[CallPart]) -> None:
    """Put `more` behind `parts`; what is of one call becomes one part."""
    for part in more:
        if parts and parts[-1].index == part.index:
            parts[-1] = replace(parts[-1], arguments=parts[-1].arguments + part.arguments)
        else:
            parts.append(part)
