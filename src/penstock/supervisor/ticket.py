"""What the API holds of an open job: a stream of events per choice, and the ways to end it.

The queue belongs to the ticket; the backend puts in, one consumer takes out. Taking is cancellation-safe: an
event leaves the queue only when it is returned. A slow consumer costs memory for ids, not for events, because
what waits for the same choice is merged. After each choice's one `Finished` comes `Done`.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec

from penstock import wire
from penstock.errors import PenstockError


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be generated: `n` choices over one prompt (ids, typecode 'I')."""

    prompt: array[int]
    sampling: wire.Sampling
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    borders: Sequence[int] = ()
    """Positions where messages begin in the prompt."""
    turn: int | None = None
    """Position where the next turn is expected to leave the prompt."""
    stops: bool = False
    """Whether a stop string may end it."""
    namespace: str = ""
    """Whose prompts it may take up from the cache."""
    grammar: str = ""
    """What the answer may be, as `wire.Submit` has it."""
    seed: int | None = None
    """The client's seed. None: `sampling.seed` if that is not 0, else one is drawn."""


class Tokens(msgspec.Struct):
    """New ids of a choice; `logprobs` and `top` are as long as `ids` where they were asked for."""

    choice: int
    ids: list[int]
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None


class Finished(msgspec.Struct, frozen=True):
    """A choice's end. `reason`: stop (end-of-turn id), length, cut (ended by `Ticket.end`)."""

    choice: int
    reason: str


class Progress(msgspec.Struct, frozen=True):
    """Prefill of the first choice, in ids."""

    done: int
    total: int


Event = Tokens | Finished | Progress


class Done(Exception):
    """Every choice has finished, or the ticket was closed."""


@dataclass(slots=True)
class TicketStats:
    """Times are of `time.monotonic`; counts are ids."""

    submitted: float
    generated: list[int]
    cached: int = 0
    why: str = ""
    """Why no more of the prompt was in the cache."""
    first_prefill: float | None = None
    first_token: float | None = None
    restarts: int = 0
    """Engines that died under this job."""


class Ticket:
    """An open job. `ids` are the sequence ids of its choices, in order."""

    def __init__(self, job: Job, ids: list[int], end: Callable[[int, int | None], None]) -> None:
        self.ids = ids
        self.stats = TicketStats(monotonic(), [0] * job.n)
        self._end = end
        self._open = set(range(job.n))
        self._events: deque[Event] = deque()
        self._failure: PenstockError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        """Nothing of it is open any more; events may still wait to be taken."""
        return not self._open

    async def next(self) -> Event:
        """The next event.

        Raises PenstockError if a choice failed (the others are ended then), Done when all is over.
        """
        while not self._events:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                raise Done
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def end(self, choice: int, keep: int) -> None:
        """Ends a choice for a reason of text: its first `keep` ids (prompt and answer) count.

        `Finished(choice, "cut")` follows; ids that still wait are dropped. Void if the choice has ended.
        """
        if choice in self._open:
            self._end(self.ids[choice], keep)

    def close(self) -> None:
        """Ends all that is open: the client is gone, nobody takes events any more. Idempotent."""
        self._events.clear()
        for choice in list(self._open):
            self._end(self.ids[choice], None)
        self._events.clear()

    def fail(self, error: PenstockError) -> None:
        """Ends all that is open, and `next` raises `error`: somebody else than the client wants it so."""
        self._failure = self._failure or error
        self.close()
        self._wake()

    # What follows is the backend's side.

    def put_tokens(
        self,
        choice: int,
        ids: list[int],
        logprobs: list[float] | None,
        top: list[list[tuple[int, float]]] | None,
    ) -> None:
        """Takes the lists over."""
        stats = self.stats
        if stats.first_token is None:
            stats.first_token = monotonic()
            if stats.first_prefill is None:
                stats.first_prefill = stats.first_token
        stats.generated[choice] += len(ids)
        events = self._events
        last = events[-1] if events else None
        if type(last) is Tokens and last.choice == choice:
            last.ids += ids
            if last.logprobs is not None and logprobs is not None:
                last.logprobs += logprobs
            if last.top is not None and top is not None:
                last.top += top
        else:
            events.append(Tokens(choice, ids, logprobs, top))
        self._wake()

    def put_progress(self, choice: int, done: int, total: int) -> None:
        if self.stats.first_prefill is None:
            self.stats.first_prefill = monotonic()
        if choice != 0:
            return
        if self._events and isinstance(self._events[-1], Progress):
            self._events.pop()
        self._events.append(Progress(done, total))
        self._wake()

    def put_finished(self, choice: int, reason: str, generated: int) -> None:
        self._open.discard(choice)
        if reason == "cut":
            waiting = [e for e in self._events if not (isinstance(e, Tokens) and e.choice == choice)]
            self._events = deque(waiting)
        self.stats.generated[choice] = generated
        self._events.append(Finished(choice, reason))
        self._wake()

    def put_failure(self, choice: int, error: PenstockError) -> None:
        """The first failure counts; the other choices are ended."""
        self._open.discard(choice)
        if self._failure is None:
            self._failure = error
            for other in list(self._open):
                self._end(self.ids[other], None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
