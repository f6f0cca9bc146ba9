"""The engine's books: which sequence holds which lease, and the allocator's pool as one more holder.

The loop asks here before anything is allocated; the ledger does the arithmetic. Pure but for the pool's two
calls, which are handed in. Invariant: every row on board has exactly one lease, of its capacity's cost, and
every launched step one for its transient until it has been read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from penstock.engine.scheduler import Room
from penstock.engine.sequence import Sequence
from penstock.memory.audit import Count, Finding, audit
from penstock.memory.costs import Costs
from penstock.memory.ledger import Account, Lease, Ledger
from penstock.memory.predict import Transient

POOL_LIMIT = 1 << 30
POOL_SHARE = 0.05
"""What freed buffers that the allocator keeps may hold: this share of the ceiling, at most 1 GiB."""


class Accounts:
    """Leases of the weights, the pool, the rows and the step in flight."""

    def __init__(
        self,
        ceiling: int,
        weights: int,
        costs: Costs,
        set_pool: Callable[[int], object] = lambda limit: None,
        set_throttle: Callable[[int], object] = lambda limit: None,
    ) -> None:
        """`set_pool` caps what the allocator keeps, in bytes; 0 makes it give everything back.

        `set_throttle` says above how many bytes the allocator lets no more work run ahead of the device.
        """
        self.ceiling = ceiling
        self.costs = costs
        self.ledger = Ledger(ceiling)
        self.set_pool = set_pool
        self.set_throttle = set_throttle
        self.departures = 0
        self.rows: dict[int, Lease] = {}
        self._weights = self._take(Account.WEIGHTS, weights)
        self._states = self._take(Account.STATES, 0)
        self._pool: Lease | None = None
        self.restore_pool()

    def set_budget(self, budget: int) -> None:
        """A new budget, at most the ceiling; more of it lets preempted sequences come back."""
        budget = min(budget, self.ceiling)
        self.departures += budget > self.ledger.budget
        self.ledger.budget = budget
        self._throttle()

    @property
    def lasting(self) -> int:
        """The device's bytes that are held beside the pool and the steps in flight."""
        passing = (Account.TRANSIENT, Account.POOL, Account.GRAMMARS)
        return self.ledger.held - sum(self.ledger.balance(account) for account in passing)

    def room(self, evictable: int = 0, recent: int = 0) -> Room:
        """What the scheduler may count on."""
        pool = 0 if self._pool is None else self._pool.size
        return Room(self.ledger.room, pool, evictable, recent, self.ceiling - self.ledger.budget)

    def admit(self, sequence: Sequence, capacity: int) -> None:
        """A row's lease, less what it takes over. The scheduler has found that it fits."""
        size = max(0, self.costs.row(capacity) - sequence.reuse)
        self.rows[sequence.id] = self._take(Account.LIVE_KV, size, self.costs.buffers)
        sequence.capacity = capacity

    def entered(self, sequence: Sequence) -> None:
        """What it was to take over is no longer the cache's: the row's lease is whole."""
        self.ledger.correct(self.rows[sequence.id], self.costs.row(sequence.capacity), self.costs.buffers)

    def constrain(self, size: int) -> Lease:
        """The host's bytes for a grammar, or for what all grammars need."""
        return self._take(Account.GRAMMARS, size)

    def grow(self, sequence: Sequence, capacity: int) -> None:
        """A row's lease for a larger capacity."""
        lease = self.rows[sequence.id]
        more = self._take(Account.LIVE_KV, self.costs.growth(sequence.capacity, capacity))
        size = lease.size + more.size
        self.ledger.release(more)
        self.ledger.correct(lease, size, lease.buffers)
        sequence.capacity = capacity

    def leave(self, sequence: Sequence) -> None:
        """A row's memory is free, but for its states: `keep_states` says when they are."""
        self.ledger.release(self.rows.pop(sequence.id))
        self.ledger.correct(self._states, self._states.size + self.costs.states, 0)

    def adopt(self, sequence: Sequence, size: int, buffers: int) -> Lease:
        """Of a row's memory the cache keeps so much; the rest is free, but for its states."""
        lease = self.rows.pop(sequence.id)
        self.ledger.move(lease, Account.CACHED)
        self.ledger.correct(lease, size, buffers)
        self.ledger.correct(self._states, self._states.size + self.costs.states, 0)
        return lease

    def keep_states(self, orphans: int) -> None:
        """States of rows that have left, which stay where they were stacked until the stack is made anew."""
        self.ledger.correct(self._states, orphans * self.costs.states, 0)

    def begin(self, transient: int) -> Lease:
        """The lease of a step's transient, to be released when the step was read."""
        lease = self._take(Account.TRANSIENT, transient)
        self._throttle()
        return lease

    def _throttle(self) -> None:
        # Below what is held, which may be more than the budget, every operation would wait for the last.
        self.set_throttle(max(self.ledger.budget, self.ledger.held))

    def audit(self, rows: Mapping[int, int], cached: Iterable[Lease], active: int) -> list[Finding]:
        """Compare with what the rows hold, by sequence id, and with all that the allocator has handed out."""
        counts = [Count(self.rows[id_], size, growing=True) for id_, size in rows.items() if id_ in self.rows]
        counts += [Count(lease, lease.size) for lease in cached]
        counts.append(Count(self._states, self._states.size))
        return audit(self.ledger, counts, active)

    def clear_pool(self) -> None:
        """The allocator gives back what it keeps, and keeps nothing until there is room again."""
        self.set_pool(0)
        if self._pool is not None:
            self.ledger.release(self._pool)
            self._pool = None

    def restore_pool(self, planned: int = 0) -> None:
        """Let the allocator keep freed buffers again, if there is room for twice as many beside a plan."""
        limit = int(min(POOL_LIMIT, self.ceiling * POOL_SHARE))
        if self._pool is None and self.ledger.room - planned >= 2 * limit:
            self._pool = self._take(Account.POOL, limit)
            self.set_pool(limit // 2)  # it takes in one more buffer, however large, while it is below its cap

    def floors(self, on_board: list[Sequence], transient: Transient) -> tuple[int, int]:
        """Bytes that all rows and their next step hold, and the same for the oldest row alone.

        `on_board` by arrival. The budget is not cut below the second, and below the first only in need.
        What the cache holds is no part of either: it goes first.
        """
        floor = self.ledger.held - self.ledger.balance(Account.POOL) - self.ledger.balance(Account.CACHED)
        least = floor - sum(self.rows[s.id].size for s in on_board[1:])
        if not self.ledger.balance(Account.TRANSIENT):
            least += transient.decode([s.capacity for s in on_board[:1]])
        return floor, least

    def _take(self, account: Account, size: int, buffers: int = 0) -> Lease:
        return self.ledger.take(account, size, buffers, self.ceiling)
