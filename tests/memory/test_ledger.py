"""The ledger's law under any sequence of calls."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.laws import conserves

from penstock.memory.ledger import Account, Ledger, LedgerError

SIZES = st.integers(0, 2_000)


class LedgerMachine(RuleBasedStateMachine):
    """Random calls against a model that is a plain list of (account, size)."""

    @initialize(budget=st.integers(0, 5_000))
    def start(self, budget: int) -> None:
        self.ledger = Ledger(budget, buffer_limit=20)
        self.leases: list = []
        self.cut = False

    @rule(account=st.sampled_from(Account), size=SIZES, buffers=st.integers(0, 4))
    def reserve(self, account: Account, size: int, buffers: int) -> None:
        total = sum(lease.size for lease in self.leases)
        fits = (size == 0 or total + size <= self.ledger.budget) and self.ledger.buffers + buffers <= 20
        lease = self.ledger.reserve(account, size, buffers)
        assert (lease is not None) == fits
        if lease is not None:
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), share=st.floats(0, 1))
    def correct(self, data: st.DataObject, share: float) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.ledger.correct(lease, int(lease.size * share), lease.buffers)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        self.ledger.release(lease)
        with pytest.raises(LedgerError):
            self.ledger.release(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), account=st.sampled_from(Account))
    def move(self, data: st.DataObject, account: Account) -> None:
        before = self.ledger.held
        self.ledger.move(data.draw(st.sampled_from(self.leases)), account)
        assert self.ledger.held == before

    @rule(budget=st.integers(0, 5_000))
    def change_budget(self, budget: int) -> None:
        self.ledger.budget = budget
        self.cut = True

    @invariant()
    def law(self) -> None:
        if not hasattr(self, "ledger"):
            return
        assert conserves(self.ledger)
        assert self.ledger.held == sum(lease.size for lease in self.leases)
        assert sum(self.ledger.statement().values()) == self.ledger.held
        assert self.cut or self.ledger.held <= self.ledger.budget


TestLedger = LedgerMachine.TestCase


def test_a_take_beyond_the_ceiling_is_a_bug() -> None:
    ledger = Ledger(100)
    ledger.take(Account.LIVE_KV, 50, 0, 120)
    with pytest.raises(LedgerError):
        ledger.take(Account.TRANSIENT, 71, 0, 120)
    assert ledger.held == 50


def test_after_a_cut_nothing_new_fits() -> None:
    ledger = Ledger(100)
    assert ledger.reserve(Account.WEIGHTS, 80) is not None
    ledger.budget = 50
    assert ledger.room == -30
    assert ledger.reserve(Account.POOL, 1) is None
    assert ledger.reserve(Account.POOL, 0) is not None
