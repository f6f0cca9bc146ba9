"""The audit: the ledger's leases against a recount from the owners of the bytes. Pure; the engine counts.

Run when nothing is in flight, since a step's buffers are nobody's then. A lease below what its owner holds is
the dangerous kind, one above only wastes room; both are set to the recount and counted as repairs, because
either shows that some path forgot to say what it did. A row may hold less than its lease (buffers come with
the first chunk), never more; what has no owner may not be there at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.memory.ledger import Account, Lease, Ledger

TOLERANCE = 256 << 10
"""Bytes for what is too small to lease: ids, settings of draws, constants that a model makes late."""
_APART = (Account.WEIGHTS, Account.POOL, Account.GRAMMARS)
"""No owner is asked for these."""


@dataclass(frozen=True, slots=True)
class Count:
    """What an owner holds under one lease. `growing`: it may be less, because more comes with use."""

    lease: Lease
    size: int
    growing: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A lease that was wrong, or (without one) bytes that nobody owns."""

    lease: Lease | None
    held: int
    found: int

    def __str__(self) -> str:
        if self.lease is None:
            return f"{self.found} bytes are held, and {self.held} are under lease"
        return f"{self.lease.account.value}: {self.held} bytes under lease, {self.found} found"


def audit(ledger: Ledger, counts: Sequence[Count], active: int) -> list[Finding]:
    """Compare, heal, and say what was wrong. `active`: bytes that the allocator has handed out in all.

    Leases that no count names are gone with their owners: transients and rows of the past are released.
    What is left over nobody owns, so it can only be charged: to the weights, so that the bound holds.
    """
    findings = []
    named = {id(count.lease) for count in counts}
    for lease in ledger.leases():
        if id(lease) not in named and lease.size and lease.account not in _APART:
            findings.append(Finding(lease, lease.size, 0))
            ledger.correct(lease, 0, 0)
    for count in counts:
        lease = count.lease
        if count.size > lease.size or (count.size < lease.size and not count.growing):
            findings.append(Finding(lease, lease.size, count.size))
            ledger.correct(lease, count.size, lease.buffers)
    owned = ledger.held - ledger.balance(Account.POOL) - ledger.balance(Account.GRAMMARS)
    excess = active - owned
    if excess > TOLERANCE or (excess < -TOLERANCE and not any(count.growing for count in counts)):
        findings.append(Finding(None, owned, active))
        weights = next(lease for lease in ledger.leases() if lease.account is Account.WEIGHTS)
        ledger.correct(weights, max(0, weights.size + excess), weights.buffers)
    return findings
