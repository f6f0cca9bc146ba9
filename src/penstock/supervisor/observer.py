"""What the front has seen of its engines: counts, times, samples of the last minutes, what went wrong.

Owns what outlives an engine: an engine's own counts start at zero, so those of the dead are kept and added.
Reads the backend, decides nothing, costs a token next to nothing. Invariant: counts never fall, every list
is bounded, and neither text nor ids of a prompt is in any of it.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from time import monotonic, time
from typing import TYPE_CHECKING, Any

from msgspec import structs

from penstock import wire
from penstock.memory.ledger import Account
from penstock.sizes import gigabytes
from penstock.status import Cache, History, Mark, Memory
from penstock.supervisor.events import Events

if TYPE_CHECKING:
    from penstock.supervisor.backend import Backend
    from penstock.supervisor.journal import Entry
    from penstock.supervisor.ticket import Ticket

_log = logging.getLogger("penstock.supervisor")

EVERY = 1.0
"""Seconds between two samples."""
KEPT = 600
"""Samples, and marks."""
MEASURES = {
    "evictions": "evict",
    "preemptions": "preempt",
    "given_up": "giveup",
    "shortened_chunks": "shortened",
    "pool_clears": "clearpool",
    "waits": "waits",
    "step_errors": "errors",
    "out_of_memory": "out_of_memory",
    "audit_repairs": "audit_repairs",
}
"""Names of counts, and what the engine calls them."""
NOTICED, SAID = 3, 5
"""How many of them are worth a line in the log, and how many such a line tells."""
MARKED = {"evictions": "eviction", "preemptions": "preemption", "engine_deaths": "death"}
TOLD = {
    "preemptions": ("preemption", "info", "Rows gave up their memory and wait to go on"),
    "given_up": ("given_up", "error", "Requests were ended for want of memory"),
    "step_errors": ("step_error", "error", "Steps failed and were computed again"),
    "audit_repairs": ("audit_repair", "warning", "Repairs of the engine's books"),
}
"""Counts whose rise is an event: its kind, level and words."""
STAGES = ("queued", "prefill", "decode")
_CUT = 0.99
"""A budget below this share of the one before is told of."""
_LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_GAPS = (0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30)


class Histogram:
    """Counts of values up to each bound, and beyond the last. Seconds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float] = _LATENCIES) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Observer:
    """Told by the backend and the API; read for /v1/status, /metrics and /health."""

    def __init__(self, backend: Backend) -> None:
        self.began = monotonic()
        self.events = Events()
        self.cancels: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.gaps = Histogram(_GAPS)
        self.first_token, self.whole, self.queue, self.prefill, self.decode = (Histogram() for _ in range(5))
        self._backend = backend
        self._own: Counter[str] = Counter()
        self._dead: Counter[str] = Counter()
        self._dead_evicted: Counter[str] = Counter()
        self._cached, self._cached_at = wire.Cached(), 0.0
        self._transient: tuple[int, int] | None = None
        self._heard = 0.0
        self._sampled = 0.0
        self._before: Counter[str] = Counter()
        self._budget = 0
        self._samples: deque[tuple[Any, ...]] = deque(maxlen=KEPT)
        self._marks: deque[Mark] = deque(maxlen=KEPT)

    # What the backend tells.

    def heard(self, status: wire.Status) -> None:
        """An engine's books."""
        self._heard = time()
        if status.transient[0]:
            self._transient = status.transient
        if status.cache is not None:
            self._cached, self._cached_at = status.cache, self._heard

    def gone(self, status: wire.Status | None, why: str | None) -> None:
        """The engine has ended, with these last books; `why`: it died."""
        self._dead.update({} if status is None else status.counts)
        self._dead_evicted.update(self._cached.evicted)
        self._cached, self._cached_at, self._transient, self._heard = wire.Cached(), 0.0, None, 0.0
        if why is not None:
            open_there = [e for e in self._backend.journal if e.life.is_open and e.epoch is not None]
            self._own["continuations"] += len(open_there)
            self.events.note("engine_death", "error", f"The engine died: {why}.")

    def started(self, entry: Entry, cached: int) -> None:
        """Its prompt is about to be computed, but for `cached` ids."""
        self._own["prompt_tokens"] += len(entry.job.prompt)
        self._own["cached_tokens"] += cached

    def prefilled(self, entry: Entry, done: int) -> None:
        """So far has its prompt been computed. To be told before its entry is."""
        self._own["prefilled_tokens"] += max(0, done - max(entry.prefilled, entry.ticket.stats.cached))

    def ended(self, entry: Entry, reason: str) -> None:
        """A choice is over. `reason`: stop, length, abort or error."""
        stats, now = entry.ticket.stats, monotonic()
        self.finished[reason] += 1
        if reason == "abort":
            self.cancels[self.stage(entry)] += 1
        elif reason != "error" and stats.first_token is not None:
            begun = stats.first_prefill or stats.first_token
            self.whole.observe(now - stats.submitted)
            self.queue.observe(begun - stats.submitted)
            self.prefill.observe(stats.first_token - begun)
            self.decode.observe(now - stats.first_token)

    # Once a second.

    def look(self) -> None:
        """Take a sample, if it is time for one, and say what has happened since the last."""
        if monotonic() - self._sampled < 0.9 * EVERY:
            return
        self._sampled, now = monotonic(), time()
        status, budget, counts = self._backend.status, self._backend.warden.budget, self.counts()
        news, self._before = counts - self._before, counts
        queued, running = self.lines()
        tokens = counts["prefilled_tokens"], counts["generated_tokens"]
        owners = {} if status is None else status.accounts
        self._samples.append((now, budget and budget.size, running, queued, *tokens, owners))
        for name in MARKED.keys() & news.keys():
            self._marks.append(Mark(time=now, kind=MARKED[name], count=news[name]))
        for name in TOLD.keys() & news.keys():
            kind, level, words = TOLD[name]
            self.events.note(kind, level, f"{words}: {news[name]:,}.", news[name])
        if taken := [name for name in list(MEASURES)[:SAID] if news[name]]:
            noticed = any(name in taken for name in list(MEASURES)[:NOTICED])
            words = ", ".join(f"{name.replace('_', ' ')} {news[name]:,}" for name in taken)
            _log.log(logging.INFO if noticed else logging.DEBUG, "memory: %s", words)
        if budget is not None:
            if budget.size < self._budget * _CUT:
                cut = f"The memory budget was cut to {gigabytes(budget.size)}: {budget.decided_by}."
                self.events.note("budget_cut", "warning", cut)
            self._budget = budget.size

    # What is read.

    def counts(self) -> Counter[str]:
        """Since the server's start, by the names of `status.Status.counts`; those of zero are there, too."""
        status = self._backend.status
        engines = self._dead + Counter({} if status is None else status.counts)
        found = Counter({name: engines[theirs] for name, theirs in MEASURES.items()})
        for name in ("continuations", "prompt_tokens", "cached_tokens", "prefilled_tokens"):
            found[name] = self._own[name]
        found["generated_tokens"] = self._backend.journal.generated
        found["engine_deaths"] = self._backend.deaths
        return found

    def stage(self, entry: Entry) -> str:
        """queued, prefill or decode."""
        if (status := self._backend.status) is not None:
            if entry.id in status.preempted:
                return STAGES[0]
            if entry.stage == STAGES[0] and entry.id in status.rows:
                return STAGES[1]
        return entry.stage

    def lines(self) -> tuple[int, int]:
        """How many open choices wait, and how many are on board."""
        stages = [self.stage(entry) for entry in self._backend.journal if entry.life.is_open]
        queued = stages.count(STAGES[0])
        return queued, len(stages) - queued

    def of(self, tickets: Iterable[Ticket]) -> dict[str, Any]:
        """What the engine has told of a request's choices, by the names of `status.Request`."""
        ids = [id for ticket in tickets for id in ticket.ids]
        entries = [entry for id in ids if (entry := self._backend.journal.get(id)) and entry.life.is_open]
        status = self._backend.status
        held = [] if status is None else [status.rows[e.id] for e in entries if e.id in status.rows]
        return {
            "stage": max(map(self.stage, entries), key=STAGES.index, default=STAGES[-1]),
            "prefilled": max((max(e.prefilled, e.ticket.stats.cached) for e in entries), default=0),
            "bytes": sum(held) if held else None,
            "preempted": status is not None and any(e.id in status.preempted for e in entries),
        }

    def memory(self) -> Memory:
        """The engine's bytes by owner; the front's are the API's to tell."""
        status, memory = self._backend.status, Memory()
        if (budget := self._backend.warden.budget) is not None:
            memory.budget, memory.budget_decided_by = budget.size, budget.decided_by
            memory.ceiling = budget.ceiling
            memory.ceiling_decided_by = self._backend.warden.ceiling_decided_by
        if status is not None:
            memory.owners, memory.held, memory.at = (
                status.accounts,
                sum(status.accounts.values()),
                self._heard,
            )
            memory.active, memory.pooled, memory.correction = status.active, status.pooled, status.correction
        if self._transient is not None:
            memory.predicted_transient, memory.measured_transient = self._transient
        return memory

    def cache(self) -> Cache:
        """The prompt cache; nothing is in it while there is no engine."""
        status = self._backend.status
        (evicted := Counter(self._dead_evicted)).update(self._cached.evicted)
        told = structs.asdict(self._cached) | {"evicted": evicted}
        return Cache(
            bytes=0 if status is None else status.accounts.get(Account.CACHED.value, 0),
            queries=self._own["prompt_tokens"],
            hits=self._own["cached_tokens"],
            tree_at=self._cached_at or None,
            **told,
        )

    def history(self, since: float) -> History:
        """Samples and marks later than `since`, in seconds of Unix time."""
        chosen = [sample for sample in self._samples if sample[0] > since]
        columns = [list(column) for column in zip(*chosen, strict=True)] or [[] for _ in range(7)]
        at, budget, running, queued, prefilled, generated, owners = columns
        return History(
            interval=EVERY,
            time=at,
            budget=budget,
            owners={account.value: [held.get(account.value, 0) for held in owners] for account in Account},
            running=running,
            queued=queued,
            prompt_tokens=prefilled,
            generated_tokens=generated,
            marks=[mark for mark in self._marks if mark.time > since],
        )
