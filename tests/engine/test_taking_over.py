"""Rows that take over the prefix they start from, where it does not fit twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.engine_loop import EngineLoop
from tests.support.lending import (
    CHILD,
    MOST,
    NAMES,
    NEXT,
    TOLERANCE,
    difference,
    ends,
    ends_in_little_room,
    fail_a_copy,
    fresh,
    lent_once,
    quiet,
    sequence,
    submit,
    until,
    use_short_segments,
)
from tests.support.tree_laws import check


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    use_short_segments(monkeypatch)


def ends_unpacked(engine: EngineLoop, parent: int) -> None:
    """Its buffers themselves become the tree's."""
    quiet(engine)
    engine.cache._lent(sequence(engine, parent))  # segments are cut where it parts from others
    engine.cache._room = lambda size: False  # type: ignore[method-assign]
    ends(engine, parent)
    assert engine.cache._adopted
    engine.cache.tidy = lambda: None  # type: ignore[method-assign]
    del engine.cache._room  # type: ignore[method-assign]


def room_for_one(engine: EngineLoop) -> None:
    """The budget lacks a byte for a row of NEXT's beside what is cached."""
    engine.turn()  # states of rows that left are gone by then
    costs = engine.accounts.costs
    more = costs.row(len(NEXT) + MOST) + costs.states - 1
    engine.accounts.clear_pool()
    engine.accounts.set_budget(engine.accounts.ledger.held + more)


@pytest.mark.parametrize("end", [ends, ends_in_little_room, ends_unpacked])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_takes_over_its_prefix_where_there_is_no_room_for_both(
    name: str, end: Callable[[EngineLoop, int], None]
) -> None:
    """Nothing is evicted and computed again; the tree borrows it from the row from then on."""
    engine, parent = lent_once(name)
    end(engine, parent)
    engine.cache.__dict__.pop("_room", None)
    room_for_one(engine)
    after = submit(engine, NEXT)
    until(engine, lambda: bool(engine.answers[after].prefilled))
    assert engine.loop.counts["taken_over"] == 1
    assert engine.answers[after].cached >= 138
    assert engine.cache.tree._held_twice() == (0, 0)
    assert not engine.cache._adopted
    check(engine.cache.tree)
    beside = submit(engine, CHILD)
    engine.play()
    assert engine.loop.counts["preempt"] == engine.loop.counts["errors"] == 0
    assert engine.answers[beside].cached >= 98 or name in ("qwen3_5", "gemma3_text"), "no state"
    for id_, prompt in ((after, NEXT), (beside, CHILD)):
        assert difference(engine.answers[id_], fresh(name, tuple(prompt))) <= TOLERANCE
    engine.close()


@pytest.mark.parametrize("at", range(1, 12, 3))
@pytest.mark.parametrize("end", [ends, ends_unpacked])
def test_an_error_while_a_prefix_is_taken_over_leaves_nothing_half(
    at: int, end: Callable[[EngineLoop, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, parent = lent_once("qwen3")
    end(engine, parent)
    room_for_one(engine)
    calls = fail_a_copy(at, monkeypatch)
    after = submit(engine, NEXT)
    engine.play()
    monkeypatch.undo()
    assert engine.loop.counts["taken_over"] >= 1
    assert engine.loop.counts["errors"] == (len(calls) >= at)
    check(engine.cache.tree)
    assert difference(engine.answers[after], fresh("qwen3", tuple(NEXT))) <= TOLERANCE
    engine.close()
