"""What the engine tells of its books: by owner, by row, and of the prompt cache."""

from __future__ import annotations

import pytest
from tests.engine.test_waiting import told
from tests.support import tiny_models
from tests.support.engine_loop import EngineLoop

from penstock import wire
from penstock.engine import status as status_module
from penstock.engine.batch import Runner
from penstock.engine.scheduler import Chunk


@pytest.fixture(name="engine")
def _engine():
    engine = EngineLoop(
        Runner(tiny_models.build("qwen3")), vocab_size=tiny_models.VOCAB, cache_bytes=None, weights=1000
    )
    yield engine
    engine.play()
    engine.close()


def test_the_parts_add_up_to_the_ledger_at_every_turn(engine: EngineLoop) -> None:
    for prompt in (range(5, 205), range(5, 105), range(300, 330)):
        engine.submit(prompt, max_tokens=30)
    seen = set()
    while engine.loop.sequences or engine.channel.inbox:
        engine.turn()
        status, ledger = told(engine), engine.accounts.ledger
        assert sum(status.accounts.values()) == ledger.held
        assert set(status.rows) == {s.id for s in engine.loop.sequences.values() if s.row is not None}
        assert sum(status.rows.values()) == status.accounts["live_kv"]
        seen |= {owner for owner, size in status.accounts.items() if size}
    assert {"weights", "pool", "live_kv", "cached"} <= seen


def test_a_steps_transient_is_told_once_with_what_was_leased(engine: EngineLoop) -> None:
    engine.submit(range(5, 205), max_tokens=3)
    engine.play()
    leased, held = told(engine).transient
    assert held > 0
    assert leased >= 0
    assert told(engine).transient == (0, 0), "of the steps since the last report"


def test_who_waits_is_counted_once_however_long_it_waits() -> None:
    runner = Runner(tiny_models.build("qwen3"))
    engine = EngineLoop(runner, vocab_size=tiny_models.VOCAB, decode_concurrency=1)
    for _ in range(3):
        engine.submit([5, 6, 7], max_tokens=9)
    for _ in range(4):
        engine.turn()
        status = told(engine)
    assert (status.running, status.waiting, status.counts["waits"]) == (1, 2, 2)
    engine.play()
    engine.close()


def test_a_preempted_row_is_told_of_until_it_is_back(engine: EngineLoop) -> None:
    first, second = (engine.submit(prompt, max_tokens=40) for prompt in (range(5, 60), range(100, 160)))
    while len(engine.answers[second].tokens) < 3:
        engine.turn()
    ceiling = engine.accounts.ledger.budget
    engine.channel.inbox.append(wire.Budget(told(engine).least, ceiling, "critical memory pressure"))
    engine.turn()
    engine.turn()
    status = told(engine)
    assert status.preempted == [second]
    assert set(status.rows) == {first}
    assert status.counts["preempt"] == 1
    engine.channel.inbox.append(wire.Budget(ceiling, ceiling, ""))
    while set(told(engine).rows) != {first, second}:
        engine.turn()
    assert told(engine).preempted == []


def test_chunks_are_counted_that_memory_made_shorter(engine: EngineLoop) -> None:
    for decided_by in ("stall target", "memory", "memory"):
        engine.loop.reporter.chunk(Chunk(None, 256, decided_by))  # type: ignore[arg-type]
    status = told(engine)
    assert (status.counts["shortened"], status.decided_by) == (2, "memory")


def test_what_leaves_the_cache_is_counted_by_the_reason(engine: EngineLoop) -> None:
    def cached() -> wire.Cached:
        engine.loop.reporter._cache_due = 0.0
        books = told(engine).cache
        assert books is not None
        return books

    ledger = engine.accounts.ledger
    ceiling = ledger.budget
    gone = dict.fromkeys(("memory", "budget", "cleared", "caps"), 0)
    assert cached().evicted == gone
    for reason in ("budget", "cleared", "memory"):
        engine.submit(range(5, 205), max_tokens=3)
        engine.play()
        size = cached().tree[0].bytes
        assert size == engine.cache.tree.bytes > 0
        if reason == "budget":
            engine.accounts.clear_pool()
            engine.channel.inbox.append(wire.Budget(ledger.held - size, ceiling, "memory pressure"))
        elif reason == "cleared":
            engine.channel.inbox.append(wire.Release(cache=True))
        else:
            engine.cache.evict(1)
            size -= engine.cache.tree.bytes
        engine.turn()
        gone[reason] = size
        assert cached().evicted == gone
        engine.channel.inbox.append(wire.Budget(ceiling, ceiling, ""))
        engine.turn()


def test_a_cap_on_the_cache_is_a_reason_too() -> None:
    runner = Runner(tiny_models.build("qwen3"))
    engine = EngineLoop(runner, vocab_size=tiny_models.VOCAB, cache_bytes=None)
    engine.cache.tree.max_entries = 1
    for start in (5, 300):
        engine.submit(range(start, start + 100), max_tokens=2)
        engine.play()
    books = engine.cache.books()
    assert (books.evicted["caps"] > 0, books.entries, books.nodes) == (True, 1, 1)
    engine.close()


def test_a_large_tree_is_walked_less_often(engine: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, clock = engine.loop.reporter, [100.0]
    reporter._cache_due = 0.0
    monkeypatch.setattr(status_module.time, "monotonic", lambda: clock[0])
    books = engine.cache.books

    def slow() -> wire.Cached:
        clock[0] += 0.05
        return books()

    monkeypatch.setattr(engine.cache, "books", slow)
    assert reporter._cached(100.0) is not None
    assert reporter._cached(104.9) is None, "0.05 s of every 5 s is a hundredth"
    assert reporter._cached(105.1) is not None
