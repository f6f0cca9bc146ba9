"""The audit on made-up books: what it finds, what it heals, and that right books are left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.support.laws import conserves

from penstock.memory.audit import TOLERANCE, Count, audit
from penstock.memory.ledger import Account, Lease, Ledger

MB = 1 << 20


def books() -> tuple[Ledger, Lease, Lease]:
    ledger = Ledger(1000 * MB)
    ledger.take(Account.WEIGHTS, 100 * MB, 0, 1000 * MB)
    ledger.take(Account.POOL, 50 * MB, 0, 1000 * MB)
    row = ledger.take(Account.LIVE_KV, 20 * MB, 4, 1000 * MB)
    cached = ledger.take(Account.CACHED, 30 * MB, 8, 1000 * MB)
    return ledger, row, cached


@given(st.integers(0, 20 * MB), st.integers(-TOLERANCE, TOLERANCE))
def test_right_books_are_left_alone(written: int, noise: int) -> None:
    ledger, row, cached = books()
    before = ledger.statement()
    active = 130 * MB + written + noise
    assert audit(ledger, [Count(row, written, growing=True), Count(cached, 30 * MB)], active) == []
    assert ledger.statement() == before


def test_a_row_that_holds_more_than_its_lease_is_charged() -> None:
    ledger, row, cached = books()
    (found,) = audit(ledger, [Count(row, 25 * MB, growing=True), Count(cached, 30 * MB)], 155 * MB)
    assert (found.lease, found.held, found.found) == (row, 20 * MB, 25 * MB)
    assert ledger.balance(Account.LIVE_KV) == 25 * MB
    assert conserves(ledger)
    assert "live_kv" in str(found)


def test_a_lease_whose_owner_is_gone_is_released() -> None:
    ledger, row, cached = books()
    step = ledger.take(Account.TRANSIENT, 7 * MB, 0, 1000 * MB)
    found = audit(ledger, [Count(cached, 30 * MB)], 130 * MB)
    assert {finding.lease for finding in found} == {row, step}
    assert ledger.held == 180 * MB
    assert audit(ledger, [Count(cached, 30 * MB)], 130 * MB) == []


def test_bytes_that_nobody_owns_are_charged_so_that_the_bound_holds() -> None:
    ledger, row, cached = books()
    counts = [Count(row, 20 * MB), Count(cached, 30 * MB)]
    (found,) = audit(ledger, counts, 190 * MB)
    assert found.lease is None
    assert ledger.balance(Account.WEIGHTS) == 140 * MB
    assert audit(ledger, counts, 190 * MB) == []
    assert len(audit(ledger, counts, 150 * MB)) == 1
    assert ledger.balance(Account.WEIGHTS) == 100 * MB
