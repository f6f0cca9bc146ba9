"""Laws of the engine's books and rows, for tests."""

from __future__ import annotations

import mlx.core as mx

from penstock.engine.batch import Runner
from penstock.memory.ledger import Account, Ledger


def conserves(ledger: Ledger) -> bool:
    """The conservation law: what the accounts hold is what is under lease, in bytes and in buffers."""
    sums = {account.value: 0 for account in Account}
    for lease in ledger.leases():
        sums[lease.account.value] += lease.size
    return sums == ledger.statement() and ledger.buffers == sum(lease.buffers for lease in ledger.leases())


def live_buffers(runner: Runner) -> list[mx.array]:
    """Every array of every open row, and of the stacked states."""
    return [array for row in runner._rows for array in row.arrays()] + runner._stack.arrays()
