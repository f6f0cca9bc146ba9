"""Glue between tickets and assemblers: ids come in from the backend, pieces of choices go out.

Owns a request's open tickets; closing a Generation closes them all, whatever happened. A choice ends once:
by the engine's word (Finished) or by its text (a stop string), where the engine is told how many ids count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from penstock.api.service import Backend
from penstock.errors import PenstockError
from penstock.log import RequestRecord
from penstock.supervisor.ticket import Event, Finished, Job, Progress, Ticket, Tokens
from penstock.text.assembler import Assembler, Delta

WAITING = 64
"""Pieces of several tickets that wait to be sent; what comes beyond waits, merged, in the tickets."""


@dataclass(frozen=True)
class Plan:
    """A request that has passed every check: what to run, and how to answer."""

    jobs: list[Job]
    assembler: Callable[[], Assembler]
    stream: bool
    include_usage: bool
    return_progress: bool
    retained: int = 0
    """Bytes of the request kept while it runs, besides ids (tool schemas)."""
    in_reasoning: bool = False
    """The answer begins inside a reasoning block."""
    echo: Any = None
    """What the API's renderer says of the request."""


@dataclass(slots=True)
class Choice:
    assembler: Assembler
    prompt: int
    generated: int = 0
    finish_reason: str | None = None


@dataclass(slots=True)
class Piece:
    """What one event brought for a choice: deltas in order, then perhaps its end."""

    index: int
    deltas: list[Delta]
    finish_reason: str | None = None
    stop: str | None = None
    """The stop string that ended it, if one did."""


@dataclass
class Generation:
    """The running choices of one request, in the order of their indices."""

    backend: Backend
    plan: Plan
    choices: list[Choice] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    _pumps: list[asyncio.Task[None]] = field(default_factory=list)
    _queue: asyncio.Queue[Piece | Progress | Exception] | None = None
    _open: int = 0

    def open(self) -> None:
        """Hand the jobs to the backend. Raises its PenstockError, with nothing left open after `close`."""
        for job in self.plan.jobs:
            self.tickets.append(self.backend.open(job))
            prompt = len(job.prompt)
            self.choices += [Choice(self.plan.assembler(), prompt) for _ in range(job.n)]
        self._open = len(self.choices)
        if len(self.tickets) > 1:
            queue = self._queue = asyncio.Queue(WAITING)
            self._pumps = [asyncio.create_task(self._pump(at, queue)) for at in range(len(self.tickets))]

    async def next(self) -> Piece | Progress | None:
        """The next thing to tell the client, or None when all choices have ended. Raises PenstockError."""
        while self._open:
            if self._queue is None:
                piece = self._take(0, await self.tickets[0].next())
                if piece is None:
                    continue
            else:
                got = await self._queue.get()
                if isinstance(got, Exception):
                    raise got
                piece = got
            if type(piece) is Piece and piece.finish_reason is not None:
                self._open -= 1
            return piece
        return None

    def _take(self, at: int, event: Event | None) -> Piece | Progress | None:
        """What an event of ticket `at` is to the client."""
        offset = at * self.plan.jobs[0].n
        if type(event) is Tokens:
            return self._feed(offset, self.tickets[at], event)
        if type(event) is Progress:
            return event
        if type(event) is Finished:
            choice = self.choices[offset + event.choice]
            if choice.finish_reason is None:
                return self._finish(offset + event.choice, choice, [], event.reason)
        return None

    def _feed(self, offset: int, ticket: Ticket, event: Tokens) -> Piece | None:
        index = offset + event.choice
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return None  # ids the engine drew before it heard of the end
        delta = choice.assembler.feed(event.ids, event.logprobs, event.top)
        stopped = choice.assembler.stopped_at
        if stopped is not None:
            choice.generated = stopped
            ticket.end(event.choice, choice.prompt + stopped)
            return self._finish(index, choice, [delta], "cut")
        choice.generated += len(event.ids)
        return Piece(index, [delta]) if delta else None

    def _finish(self, index: int, choice: Choice, deltas: list[Delta], reason: str) -> Piece:
        rest, choice.finish_reason = choice.assembler.finish(reason)
        return Piece(index, [*deltas, rest], choice.finish_reason, choice.assembler.stop)

    async def _pump(self, at: int, queue: asyncio.Queue[Piece | Progress | Exception]) -> None:
        left = self.plan.jobs[at].n
        try:
            while left:
                event = await self.tickets[at].next()
                left -= type(event) is Finished
                piece = self._take(at, event)
                if piece is not None:
                    await queue.put(piece)
        except Exception as error:
            await queue.put(error)

    def close(self) -> None:
        """End whatever is still open. Idempotent."""
        for pump in self._pumps:
            pump.cancel()
        for ticket in self.tickets:
            ticket.close()

    def cancel(self, error: PenstockError) -> None:
        """End whatever is still open; the client is told `error`."""
        for ticket in self.tickets:
            ticket.fail(error)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object; prompts count once, however many choices they have."""
        prompt = sum(len(job.prompt) for job in self.plan.jobs)
        generated = sum(choice.generated for choice in self.choices)
        reasoned = sum(choice.assembler.reasoned for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached()},
            "completion_tokens_details": {"reasoning_tokens": reasoned},
        }

    def cached(self) -> int:
        """Prompt ids that needed no prefill."""
        return sum(ticket.stats.cached for ticket in self.tickets)

    def record(self, name: str) -> RequestRecord:
        """For the log. Times are the first ticket's."""
        stats, now = self.tickets[0].stats, time.monotonic()
        started = stats.first_prefill or now
        first = stats.first_token or now
        return RequestRecord(
            id=name,
            prompt=sum(len(job.prompt) for job in self.plan.jobs),
            cached=self.cached(),
            why=self.tickets[0].stats.why,
            queue=started - stats.submitted,
            prefill=first - started,
            generated=sum(choice.generated for choice in self.choices),
            decode=now - first,
            finish="+".join(dict.fromkeys(choice.finish_reason or "open" for choice in self.choices)),
        )
