"""What the engine tells the front of its books, now and then. Reads, and owns only when it last spoke."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

import mlx.core as mx

from penstock import wire
from penstock.engine import device
from penstock.engine.accounts import Accounts
from penstock.engine.scheduler import Facts, entry_bytes
from penstock.engine.sequence import Sequence

EVERY = 0.5
"""Seconds between two reports at least."""


class Reporter:
    """Makes a `Status` when one is due."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.decided_by = ""
        """What decided the last chunk's length."""
        self._last = 0.0

    def due(
        self, sequences: Collection[Sequence], facts: Facts, counts: Mapping[str, int]
    ) -> wire.Status | None:
        """The books as they are, or None if they were reported just now."""
        now = time.monotonic()
        if now - self._last < EVERY:
            return None
        self._last = now
        on_board = sorted((s for s in sequences if s.row is not None), key=lambda s: s.arrival)
        floor, least = self.accounts.floors(on_board, facts.transient)
        if sequences and not on_board:
            # With nobody on board the first that waits counts: it was accepted, and must be able to run.
            first = min(sequences, key=lambda s: s.arrival)
            entry = entry_bytes(first, first.least_capacity, facts)
            floor, least = floor + entry, least + entry
        ledger = self.accounts.ledger
        return wire.Status(
            accounts=ledger.statement(),
            budget=ledger.budget,
            floor=floor,
            least=least,
            active=int(mx.get_active_memory()),
            pooled=int(mx.get_cache_memory()),
            running=len(on_board),
            waiting=len(sequences) - len(on_board),
            counts=dict(counts),
            decided_by=self.decided_by,
            seconds_per_prefill_id=facts.seconds_per_prefill_id,
            device_free=(left := device.free()),
            device_held=0 if left is None else device.held(),
        )
