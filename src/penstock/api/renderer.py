"""How an API words a generation: what all share, and what OpenAI's chat and text completions share.

Owns the frame of a chunk and what a whole answer keeps; the APIs give the text its shape. Stream methods
return whole server-sent events, or nothing. Invariant: the frame is encoded once per choice, so that a token
costs a concatenation.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from penstock.api.generation import Piece, Plan
from penstock.errors import PenstockError
from penstock.supervisor.ticket import Progress
from penstock.text.assembler import Delta, TokenLogprob

encode = msgspec.json.encode


DONE = b"data: [DONE]\n\n"


class Renderer(ABC):
    """The words of one request's answer."""

    def __init__(self, choices: int) -> None:
        self._deltas: list[list[Delta]] = [[] for _ in range(choices)]
        self._reasons: list[str | None] = [None] * choices

    @abstractmethod
    def opening(self) -> bytes:
        """What a stream begins with."""

    @abstractmethod
    def piece(self, piece: Piece) -> bytes:
        """What became certain, and the finish reason if there is one."""

    @abstractmethod
    def ending(self, usage: dict[str, Any]) -> bytes:
        """What a stream ends with. `usage`: OpenAI's usage object."""

    @abstractmethod
    def failure(self, error: PenstockError) -> bytes:
        """What a stream ends with that failed."""

    @abstractmethod
    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer without streaming, from what was collected."""

    def keepalive(self) -> bytes:
        """What breaks a long silence: a comment, where the API's clients take one for a sign of life."""
        return b": waiting\n\n"

    def progress(self, progress: Progress, cached: int, milliseconds: float) -> bytes:
        """How far the prefill is, where the API has words for it."""
        return b""

    def collect(self, piece: Piece) -> int:
        """Keep a piece for the whole answer; returns about how many bytes that holds."""
        self._deltas[piece.index] += piece.deltas
        self._reasons[piece.index] = piece.finish_reason
        return sum(300 + len(d.content) + len(d.reasoning) + 500 * len(d.logprobs) for d in piece.deltas)

    def collected(self, index: int) -> Delta:
        """All that was kept of one choice."""
        deltas = self._deltas[index]
        return Delta(
            content="".join(delta.content for delta in deltas),
            reasoning="".join(delta.reasoning for delta in deltas),
            tool_calls=[call for delta in deltas for call in delta.tool_calls],
            logprobs=[entry for delta in deltas for entry in delta.logprobs],
        )


class OpenAIRenderer(Renderer):
    """OpenAI's chunks, for chat and text."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]
    member: ClassVar[bytes]
    """The name of what a choice of a chunk carries."""
    nothing: ClassVar[bytes]
    """That member in the chunk with the finish reason."""

    def __init__(self, id: str, model: str, plan: Plan) -> None:
        count = sum(job.n for job in plan.jobs)
        super().__init__(count)
        self._include_usage = plan.include_usage
        self._fields = {
            "id": f"{self.id_prefix}-{id}",
            "object": self.chunk_object,
            "created": int(time.time()),
            "model": model,
        }
        self._close = b'],"usage":null}\n\n' if plan.include_usage else b"]}\n\n"
        opening = b"data: " + encode(self._fields)[:-1] + b',"choices":['
        self._heads = [opening + b'{"index":%d,"%s":' % (index, self.member) for index in range(count)]

    def opening(self) -> bytes:
        """What a stream begins with."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """One chunk per delta, and one with the finish reason."""
        data = b"".join(self.delta(piece.index, delta) for delta in piece.deltas if delta)
        if piece.finish_reason is not None:
            data += self.chunk(piece.index, self.nothing, reason=encode(piece.finish_reason))
        return data

    @abstractmethod
    def delta(self, index: int, delta: Delta) -> bytes:
        """The chunk of a delta that is not empty."""

    def chunk(self, index: int, said: bytes, logprobs: bytes = b"null", reason: bytes = b"null") -> bytes:
        """A chunk of one choice."""
        tail = b',"logprobs":' + logprobs + b',"finish_reason":' + reason + b"}"
        return self._heads[index] + said + tail + self._close

    def ending(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices, if usage was asked for, and the last line."""
        last = b"data: " + encode({**self._fields, "choices": [], "usage": usage}) + b"\n\n"
        return (last if self._include_usage else b"") + DONE

    def failure(self, error: PenstockError) -> bytes:
        """An error where a chunk is expected, which all clients of this API take for one."""
        return b"data: " + encode(error.openai()) + b"\n\n"

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer without streaming, from what was collected."""
        choices = []
        for index, reason in enumerate(self._reasons):
            said = self.collected(index)
            logprobs = self.logprobs(index, said.logprobs)
            choices.append({"index": index, **self.said(said), "logprobs": logprobs, "finish_reason": reason})
        return {**self._fields, "object": self.whole_object, "choices": choices, "usage": usage}

    @abstractmethod
    def said(self, answer: Delta) -> dict[str, Any]:
        """What a choice of a whole answer says."""

    @abstractmethod
    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The next log-probabilities of a choice, if any, in the API's shape."""
