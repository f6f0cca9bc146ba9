"""From a choice's ids to what its client sees: content, reasoning, tool calls, and where a stop ends it.

Owns the text of one answer on its way: detokenise → stop strings → split by marks. Pure: the same ids give
the same deltas, in whatever parts they come, so an answer can be taken up again by feeding it once more.
Refuses to lose anything: a call that can't be read, or that the answer's end cuts off, is shown as it stands.

Stop strings apply to all that the model writes: content, reasoning, marks and calls alike, as in servers
that know of none of these. The end-of-turn id is never text; other special tokens are text only where a
mark, a stop string or an open call needs them. White space beside a mark belongs to the mark.
What waits: half a character, a possible stop string's or mark's beginning, white space that a mark may
follow, and an open call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from penstock.text.calls import CallPart, OpenCall, append
from penstock.text.detokenizer import Detokenizer
from penstock.text.formats import CONTENT, HEADER, REASONING, TOOL, ReasoningMarkers
from penstock.text.scan import Patterns
from penstock.text.tokenizer import Tokenizer
from penstock.text.tools import ToolCall, ToolFormat, usable_schemas

LEAST_LOGPROB = -9999.0
"""What OpenAI says of an id that can't come, as one that a grammar forbids: JSON has no infinity."""


class Likely(Struct, frozen=True):
    """A token and its log-probability in nats, as OpenAI writes it."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Likely, frozen=True):
    """A token as it was drawn, with the likeliest ones at its place."""

    top_logprobs: list[Likely]


@dataclass(slots=True)
class Delta:
    """What became certain. Falsy if nothing did.

    tool_calls: whole, once they are read. call_parts: the same while they are written, for who streams them;
    a call without a word in `tool_calls` was cut off, or turned out to be none.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    call_parts: list[CallPart] = field(default_factory=list)

    def __bool__(self) -> bool:
        calls = self.tool_calls or self.call_parts
        return bool(self.content or self.reasoning or calls or self.logprobs)


class Assembler:
    """One choice's answer. `feed` while ids come, then `finish` once.

    reasoning, tools: the marks to split by; None leaves them in the content.
    tool_schemas: the request's tools, for parsers that need the types of arguments.
    in_reasoning: the template has opened the reasoning block already.
    continues: the answer follows the prompt's text directly (no chat), so a leading space is text.
    stream_calls: parts of calls are wanted while they are written; then a cut one is not shown as text.
    single_call: the first call ends the answer. settled: content that has begun has no marks in it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        reasoning: ReasoningMarkers | None = None,
        tools: ToolFormat | None = None,
        tool_schemas: list[Any] | None = None,
        in_reasoning: bool = False,
        continues: bool = False,
        stream_calls: bool = False,
        single_call: bool = False,
        settled: bool = False,
    ) -> None:
        self.stopped_at: int | None = None
        """After a stop string or the only call: how many of the fed ids count, up to that one's last."""
        self.stop: str | None = None
        """That stop string."""
        self.reasoned = 0
        """How many of the fed ids left the answer inside reasoning."""
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, continues=continues)
        self._tools = tools
        self._schemas = usable_schemas(tool_schemas) if tools else []
        self._edges = _edges(reasoning, tools)
        self._marks = {state: Patterns(targets) for state, targets in self._edges.items()}
        self._stops = Patterns(stops)
        self._control = "\0".join(
            (*self._stops.strings, *(mark for targets in self._edges.values() for mark in targets))
        )
        self._first_state = reasoning.initial if reasoning else CONTENT
        self._state = REASONING if in_reasoning and reasoning else self._first_state
        self._fresh = self._state != CONTENT  # right behind a mark: white space is the mark's
        self._fed = 0
        self._stop_held = ""
        self._mark_held = ""
        self._space = ""
        self._aside: list[str] = []
        """The text of an open call, or of a header."""
        self._call_opening = ""
        self._call_origin = CONTENT
        self._calls = 0
        self._stream_calls, self._single_call, self._settled = stream_calls, single_call, settled
        self._open_call = OpenCall("", 0)
        self._broken = False
        """Parts of something are out that turned out to be no call, so not all calls are whole."""
        self._said = self._said_content = False
        self._delta = Delta()

    def feed(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float] | None = None,
        top: Sequence[Sequence[tuple[int, float]]] | None = None,
    ) -> Delta:
        """Takes new ids, with the log-probabilities of each if asked for; returns what became certain."""
        delta = self._delta = Delta()
        control = self._tokenizer.control_ids
        for position, id in enumerate(ids):
            if self.stopped_at is not None:
                break
            self._fed += 1
            if id in control:
                if id in self._tokenizer.eos_ids:
                    continue
                text = self._special(id)
            else:
                text = self._detokenizer.push(id)
            if logprobs is not None:
                delta.logprobs.append(self._logprob(id, logprobs[position], top[position] if top else ()))
            if text:
                self._past_stops(text)
            self.reasoned += self._state == REASONING
        return delta

    def finish(self, reason: str) -> tuple[Delta, str]:
        """The rest. `reason`: the engine's (stop, length, cut). Returns OpenAI's finish_reason too."""
        self._delta = Delta()
        if self.stopped_at is None:
            self._past_stops(self._detokenizer.flush())
            held, self._stop_held = self._stop_held, ""
            self._split(held)
        held, self._mark_held = self._mark_held, ""
        self._say(held)
        if self._state == TOOL:
            if reason != "length" or self.stopped_at is not None or not self._open_call.begun:
                self._end_call("", readable=reason == "stop" and self.stopped_at is None)
        elif self._state == HEADER and not self._said:
            self._emit(CONTENT, "".join(self._aside))
        else:
            self._emit(self._state, self._space)
        if reason == "length" and self.stopped_at is None:
            return self._delta, "length"
        return self._delta, "tool_calls" if self._calls and not self._broken else "stop"

    def _special(self, id: int) -> str:
        name = self._tokenizer.token_bytes(id).decode()
        if self._state == TOOL or name in self._control:
            return self._detokenizer.literal(name)
        return ""

    def _past_stops(self, text: str) -> None:
        if not self._stops.strings:
            return self._split(text)
        text = self._stop_held + text
        cut, match = self._stops.scan(text)
        self._stop_held = "" if match else text[cut:]
        if match:
            self.stopped_at, self.stop = self._fed, match
        return self._split(text[:cut])

    def _split(self, text: str) -> None:
        if not self._edges:
            self._delta.content += text
            return
        text = self._mark_held + text
        while True:
            cut, mark = self._marks[self._state].scan(text)
            if cut:
                self._say(text[:cut])
            if mark is None:
                self._mark_held = text[cut:]
                return
            if self._settled and self._said_content and self._state == CONTENT:
                self._say(mark)
            else:
                self._cross(mark)
            if self._single_call and self._calls:
                self.stopped_at, self._mark_held = self._fed, ""
                return
            text = text[cut + len(mark) :]

    def _say(self, text: str) -> None:
        """Text of the current state, white space at its end kept back."""
        if self._state in (TOOL, HEADER):
            self._aside.append(text)
            if self._state == TOOL and self._stream_calls:
                append(self._delta.call_parts, self._open_call.push(text))
            return
        if self._fresh:
            text = text.lstrip()
            if not text:
                return
            self._fresh = False
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        self._emit(self._state, body)

    def _emit(self, state: str, text: str) -> None:
        self._said |= text != ""
        if state == REASONING:
            self._delta.reasoning += text
        else:
            self._delta.content += text
            self._said_content |= text != ""

    def _cross(self, mark: str) -> None:
        """Goes over `mark` into the next state."""
        if self._state == TOOL:
            self._end_call(mark, readable=True)
            return
        target = self._edges[self._state][mark]
        if target == TOOL:
            self._call_origin, self._call_opening = self._state, self._space + mark
            name = self._tools.name if self._tools else ""
            self._open_call = OpenCall(name, self._calls, single=self._single_call)
        self._aside.clear()
        self._state, self._space, self._fresh = target, "", True

    def _end_call(self, mark: str, *, readable: bool) -> None:
        """Closes the open call with its end `mark`: as calls if it is readable, else as the text it is."""
        text = "".join(self._aside)
        self._aside.clear()
        calls = self._tools.parse(text, self._schemas, self._calls) if readable and self._tools else None
        begun = len(self._open_call.begun)
        if calls:
            calls = self._open_call.confirmed(calls)
        if calls:
            calls = calls[:1] if self._single_call else calls
            self._calls += len(calls)
            self._delta.tool_calls += calls
            if self._stream_calls:
                whole = calls[begun:]
                self._delta.call_parts += [CallPart(c.index, c.arguments, c.id, c.name) for c in whole]
            self._said = self._fresh = True
            self._state = self._first_state
            return
        self._broken |= begun > 0
        self._state, self._fresh = self._call_origin, False
        self._emit(self._state, self._call_opening + text + mark)

    def _logprob(self, id: int, logprob: float, top: Sequence[tuple[int, float]]) -> TokenLogprob:
        likeliest = [Likely(*self._spelt(other, value)) for other, value in top]
        return TokenLogprob(*self._spelt(id, logprob), likeliest)

    def _spelt(self, id: int, logprob: float) -> tuple[str, float, list[int]]:
        data = self._tokenizer.token_bytes(id)
        return data.decode("utf-8", "replace"), max(logprob, LEAST_LOGPROB), list(data)


def _edges(reasoning: ReasoningMarkers | None, tools: ToolFormat | None) -> dict[str, dict[str, str]]:
    """state → mark → next state, every state that can be reached included; {} if there are no marks."""
    edges = reasoning.transitions() if reasoning else {}
    if tools:
        edges.setdefault(CONTENT, {})
        for state in (HEADER,) if HEADER in edges else (CONTENT, REASONING):
            if state in edges:
                edges[state][tools.start] = TOOL
        edges[TOOL] = {tools.end: CONTENT} if tools.end else {}
    return edges
