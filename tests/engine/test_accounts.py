"""The engine's books over a real model: forgetting to say what was done is found, healed and counted."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from tests.support import tiny_models
from tests.support.engine_loop import EngineLoop

from penstock.engine.accounts import Accounts
from penstock.engine.batch import Runner
from penstock.memory.costs import Costs
from penstock.memory.ledger import Account


def engine(name: str = "qwen3_5") -> EngineLoop:
    return EngineLoop(Runner(tiny_models.build(name)), vocab_size=tiny_models.VOCAB)


def finished(made: EngineLoop, length: int = 400) -> None:
    made.submit([5] * length, max_tokens=3)
    made.play()


def test_a_row_whose_lease_is_never_released_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    monkeypatch.setattr(made.accounts, "leave", lambda sequence: None)
    finished(made)
    for _ in range(2):
        made.turn()
    assert made.accounts.ledger.balance(Account.LIVE_KV) == 0, "healed when idle"
    assert made.loop.counts["audit_repairs"] == 1


@pytest.mark.parametrize("how", ["preempt", "leave"])
def test_states_of_a_row_that_the_cache_adopts_are_leased_while_they_are_stacked(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(tiny_models.build("qwen3_5"))
    made = EngineLoop(runner, vocab_size=tiny_models.VOCAB, cache_bytes=None)
    for _ in range(2):
        made.submit([5] * 40, max_tokens=60)
    for _ in range(20):
        made.turn()
    made.loop._read()
    monkeypatch.setattr(made.cache, "_copies", lambda cover, row: None)
    first = next(iter(made.loop.sequences.values()))
    getattr(made.cache, how)(first)
    assert runner.orphans == 1
    assert made.accounts.ledger.balance(Account.STATES) == made.accounts.costs.states > 0
    assert made.accounts.ledger.balance(Account.CACHED) > 0
    made.turn()
    assert runner.orphans == 0


def test_what_the_allocator_keeps_beyond_the_pools_lease_goes_when_the_step_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """GPU allocators take in one freed buffer more, however large."""
    made = engine("qwen3")
    made.submit([5] * 40, max_tokens=10)
    pool, cleared = made.accounts.ledger.balance(Account.POOL), []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(True))
    monkeypatch.setattr(mx, "get_cache_memory", lambda: pool)
    for _ in range(4):
        made.turn()
    assert cleared == []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: pool + 1)
    made.turn()
    assert cleared == [True]


def test_a_buffer_that_nobody_owns_is_found() -> None:
    made = engine()
    finished(made)
    made.turn()
    kept = mx.zeros((1 << 20,))
    mx.eval(kept)
    made.turn()
    assert made.loop.counts["audit_repairs"] == 1
    assert made.accounts.ledger.balance(Account.WEIGHTS) >= 4 << 20
    del kept


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "gemma3_text", "mamba2"])
def test_rows_never_hold_more_than_their_lease(name: str) -> None:
    """Through long chunks, which leave a window or a state with more than it needs, and through growth."""
    made = engine(name)
    made.loop.facts = replace(made.loop.facts, chunk_longest=300)
    made.submit([3 + i % 50 for i in range(700)], max_tokens=40)
    made.submit([9] * 20, max_tokens=1100)
    worst = 0.0
    for _ in range(200):
        made.turn()
        made.loop._read()
        for sequence in made.loop.sequences.values():
            if sequence.row is not None:
                with tiny_models.exact_sizes():
                    held = made.loop.runner.row_bytes(sequence.row)
                # mx.contiguous lets an array keep a buffer that is up to 16 KB too large.
                kept = sum(len(cache.cache) for cache in sequence.row.states) * 16_384
                worst = max(worst, held / (made.accounts.rows[sequence.id].size + kept))
    assert 0.1 < worst <= 1.0
    for id_ in list(made.loop.sequences):
        made.end(id_)
    made.turn()
    made.turn()
    made.close()


def test_costs_are_what_rows_hold() -> None:
    runner = Runner(tiny_models.build("gemma3_text"))
    costs: Costs = EngineLoop(runner, vocab_size=tiny_models.VOCAB).accounts.costs
    row = runner.open(500)
    mx.eval(runner.prefill(row, [1] * 300))
    with tiny_models.exact_sizes():
        assert costs.kv_per_token * 500 <= runner.row_bytes(row) <= costs.row(500)
    runner.close(row)


def test_the_pool_is_leased_with_room_for_one_buffer_beyond_its_cap() -> None:
    told: list[int] = []
    accounts = Accounts(1000, 100, Costs(1, 1, 0, 0, 1), set_pool=told.append)
    assert (told, accounts.ledger.balance(Account.POOL)) == ([25], 50)
    accounts.clear_pool()
    assert (told, accounts.ledger.balance(Account.POOL)) == ([25, 0], 0)
    accounts.restore_pool(planned=801)
    assert told == [25, 0], "there is no room for twice as much beside the plan"
    accounts.restore_pool(planned=800)
    assert (told, accounts.ledger.balance(Account.POOL)) == ([25, 0, 25], 50)


def test_work_may_run_ahead_as_far_as_the_budget() -> None:
    told: list[int] = []
    accounts = Accounts(1000, 100, Costs(1, 1, 0, 0, 1), set_throttle=told.append)
    accounts.set_budget(900)
    accounts.set_budget(40)  # below what lasts no operation would run beside another
    accounts.begin(700)
    assert told == [900, 150, 850], "as far as what is held, where that is more"
