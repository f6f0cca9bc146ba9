"""The ledger: who holds how many bytes, and whether more fit. Pure arithmetic; MLX is not known here.

Every byte that the engine's device may hold is under a lease of one account, taken *before* the bytes are:

    reserve ──┬──────────▶ release
              └──▶ move ──▶ another account, without a gap (a row's KV becomes the cache's)

Refuses what does not fit; never asks where the room could come from, that is the scheduler's part.
Invariant (the conservation law): an account's balance is the sum of its leases; their total is `held`; and
`held` ≤ `budget` unless the budget was cut below what is held, and then nothing new fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Account(Enum):
    """What bytes are for. `TRANSIENT` is what a step holds beyond its rows while it runs.

    `GRAMMARS` are the host's, which the allocator knows nothing of; all others are the device's.
    """

    WEIGHTS = "weights"
    POOL = "pool"
    LIVE_KV = "live_kv"
    STATES = "states"
    CACHED = "cached"
    TRANSIENT = "transient"
    GRAMMARS = "grammars"


@dataclass(slots=True, eq=False)
class Lease:
    """A right to `size` bytes in `buffers` buffers. Changed by its ledger alone."""

    account: Account
    size: int
    buffers: int
    open: bool = True


class LedgerError(RuntimeError):
    """A lease was used after its release, or a size below zero was asked for: a bug of the caller."""


@dataclass(slots=True)
class Ledger:
    """The one owner of the engine's bytes. `budget` and `buffer_limit` may change at any time."""

    budget: int
    buffer_limit: int = 400_000
    """Metal allows about 499,000 live buffers; MLX's own and its pool's are not ours to count."""
    _held: dict[Account, int] = field(default_factory=lambda: dict.fromkeys(Account, 0))
    _buffers: int = 0
    _leases: set[Lease] = field(default_factory=set)

    @property
    def held(self) -> int:
        """Bytes under lease."""
        return sum(self._held.values())

    @property
    def room(self) -> int:
        """Bytes that can still be reserved; below zero after a cut of the budget."""
        return self.budget - self.held

    @property
    def buffers(self) -> int:
        """Live buffers under lease."""
        return self._buffers

    def balance(self, account: Account) -> int:
        """Bytes that an account holds."""
        return self._held[account]

    def can_reserve(self, size: int, buffers: int = 0) -> bool:
        """Whether `reserve` would be granted. Zero bytes always are."""
        return (size <= 0 or size <= self.room) and self._buffers + buffers <= self.buffer_limit

    def reserve(self, account: Account, size: int, buffers: int = 0) -> Lease | None:
        """A lease of `size` bytes, or None if they don't fit. Raises LedgerError for a negative size."""
        if size < 0 or buffers < 0:
            raise LedgerError(f"a lease of {size} bytes in {buffers} buffers")
        if not self.can_reserve(size, buffers):
            return None
        return self._open(account, size, buffers)

    def take(self, account: Account, size: int, buffers: int, ceiling: int) -> Lease:
        """A lease that was decided to fit, up to `ceiling`: the last row on board may pass a cut budget.

        Raises LedgerError if it does not: the decision was wrong.
        """
        if size < 0 or self.held + size > max(ceiling, self.held):
            raise LedgerError(f"{size} bytes for {account.value} with {self.held} of {ceiling} held")
        return self._open(account, size, buffers)

    def release(self, lease: Lease) -> None:
        """The bytes are gone. Raises LedgerError if they were already."""
        self._check(lease)
        self._change(lease, 0, 0)
        lease.open = False
        self._leases.discard(lease)

    def move(self, lease: Lease, account: Account) -> None:
        """The same bytes serve another purpose from now on. Nothing is reserved, so it cannot be refused."""
        self._check(lease)
        self._held[lease.account] -= lease.size
        self._held[account] += lease.size
        lease.account = account

    def correct(self, lease: Lease, size: int, buffers: int) -> None:
        """Set a lease to what is there, fits or not: a row that grew, states, what an audit found."""
        self._check(lease)
        self._change(lease, size, buffers)

    def leases(self) -> tuple[Lease, ...]:
        """All open leases, for the audit."""
        return tuple(self._leases)

    def statement(self) -> dict[str, int]:
        """Bytes by account, for people and for /v1/status; they add up to `held`."""
        return {account.value: size for account, size in self._held.items()}

    def _open(self, account: Account, size: int, buffers: int) -> Lease:
        lease = Lease(account, size, buffers)
        self._leases.add(lease)
        self._held[account] += size
        self._buffers += buffers
        return lease

    def _change(self, lease: Lease, size: int, buffers: int) -> None:
        self._held[lease.account] += size - lease.size
        self._buffers += buffers - lease.buffers
        lease.size, lease.buffers = size, buffers

    def _check(self, lease: Lease) -> None:
        if not lease.open or lease not in self._leases:
            raise LedgerError("a lease that is not open")
