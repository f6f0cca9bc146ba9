"""What the engine tells the front of its books, now and then. Reads, and owns only when it last spoke."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

import mlx.core as mx

from penstock import wire
from penstock.engine import device
from penstock.engine.accounts import Accounts
from penstock.engine.prompt_cache import PromptCache
from penstock.engine.scheduler import Chunk, Facts, entry_bytes
from penstock.engine.sequence import Sequence

EVERY = 0.5
"""Seconds between two reports at least."""


CACHE_EVERY, CACHE_SHARE = 2.0, 0.01
"""Seconds between two walks over the prompt cache at least, and the share of the time that they may take."""


class Reporter:
    """Makes a `Status` when one is due. `counts`: measures since the engine's start."""

    def __init__(self, accounts: Accounts, cache: PromptCache, counts: Counter[str]) -> None:
        self.accounts, self.cache, self.counts = accounts, cache, counts
        self._decided_by = ""
        self._last = self._cache_due = 0.0
        self._transient = (0, 0)
        self._correction = 1.0
        self._waiting: set[int] = set()

    def chunk(self, chunk: Chunk) -> None:
        """This one is launched."""
        self._decided_by = chunk.decided_by
        self.counts["shortened"] += chunk.decided_by == "memory"

    def observed(self, granted: int, measured: int, correction: float) -> None:
        """A step held `measured` bytes beside what lasts, with `granted` leased for it."""
        self._transient = max(self._transient, (granted, measured), key=lambda pair: pair[1])
        self._correction = correction

    def due(self, sequences: Collection[Sequence], facts: Facts) -> wire.Status | None:
        """The books as they are, or None if they were reported just now."""
        now = time.monotonic()
        if now - self._last < EVERY:
            return None
        self._last = now
        on_board = sorted((s for s in sequences if s.row is not None), key=lambda s: s.arrival)
        waiting = {s.id for s in sequences if s.row is None}
        self.counts["waits"] += len(waiting - self._waiting)
        self._waiting = waiting
        floor, least = self._floors(sequences, on_board, facts)
        ledger = self.accounts.ledger
        transient, self._transient = self._transient, (0, 0)
        return wire.Status(
            accounts=ledger.statement(),
            budget=ledger.budget,
            floor=floor,
            least=least,
            active=int(mx.get_active_memory()),
            pooled=int(mx.get_cache_memory()),
            running=len(on_board),
            waiting=len(waiting),
            counts=dict(self.counts),
            decided_by=self._decided_by,
            seconds_per_prefill_id=facts.seconds_per_prefill_id,
            device_free=(left := device.free()),
            device_held=0 if left is None else device.held(),
            rows={id: lease.size for id, lease in self.accounts.rows.items()},
            preempted=[s.id for s in sequences if s.row is None and s.preempted_at is not None],
            transient=transient,
            correction=self._correction,
            cache=self._cached(now),
        )

    def _floors(
        self, sequences: Collection[Sequence], on_board: list[Sequence], facts: Facts
    ) -> tuple[int, int]:
        floor, least = self.accounts.floors(on_board, facts.transient)
        if sequences and not on_board:
            # With nobody on board the first that waits counts: it was accepted, and must be able to run.
            first = min(sequences, key=lambda s: s.arrival)
            entry = entry_bytes(first, first.least_capacity, facts)
            floor, least = floor + entry, least + entry
        return floor, least

    def _cached(self, now: float) -> wire.Cached | None:
        """The prompt cache's books, if it is time for them: a large tree is walked less often."""
        if now < self._cache_due:
            return None
        books = self.cache.books()
        took = time.monotonic() - now
        self._cache_due = now + max(CACHE_EVERY, took / CACHE_SHARE)
        return books
