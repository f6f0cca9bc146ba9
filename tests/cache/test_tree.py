"""The prefix tree against a model that knows only which handles are out, and what ids each of them holds.

The model has no tree: ids have K/V if some handle or row holds them and all before them. Whatever the tree
hands back to free is gone from the model; what then is cut off from its root must have come back, too.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.tree_laws import check, insert

from penstock.cache import tree as tree_module
from penstock.cache.tree import Cut, Tree, TreeError

IDS = st.lists(st.sampled_from([1, 1 + (1 << 24)]), min_size=1, max_size=9).map(tuple)
"""A vocabulary of two ids that differ in their last byte alone."""
SPACES = st.sampled_from(["a", "b"])
SIZE = 10
Ids = tuple[int, ...]


@dataclass(eq=False)
class Held:
    """A segment, a checkpoint (`ids` empty) or a row: `ids` after `before`."""

    space: str
    before: Ids
    ids: Ids
    size: int


@dataclass(eq=False)
class Row:
    space: str
    cover: Any
    ids: list[int] = field(default_factory=list)
    size: int = 0
    number: int = field(default_factory=itertools.count().__next__)

    before: Ids = ()


def ids_of(values: Any) -> array[int]:
    return array("I", values)


class TreeMachine(RuleBasedStateMachine):
    stateful = False

    @initialize(max_bytes=st.none() | st.integers(0, 400), max_entries=st.none() | st.integers(1, 4))
    def start(self, max_bytes: int | None, max_entries: int | None) -> None:
        self.was, tree_module.SEGMENT = tree_module.SEGMENT, 4
        self.tree = Tree(self.stateful, 3, max_bytes, max_entries)
        self.capped = max_bytes is not None or max_entries is not None
        self.out: set[Held] = set()
        self.rows: list[Row] = []
        self.adopted: set[Row] = set()
        self.pins: list[tuple[Any, Any, str, Ids]] = []
        self.lost: set[tuple[str, Ids]] = set()
        self.now = 0.0

    def teardown(self) -> None:
        if hasattr(self, "was"):
            for pin, *_ in self.pins:
                self.free(self.tree.unpin(pin, self.now))
            self.pins = []
            self.free(self.tree.evict(1 << 60, self.now))
            assert self.tree.bytes == 0, "all may go"
            assert not self.out
            for row in self.rows:
                self.free(self.tree.drop(row.cover, self.now))
            assert self.tree.tokens == 0
            tree_module.SEGMENT = self.was

    # The model

    def there(self, without: Row | None = None) -> set[tuple[str, Ids]]:
        """All prefixes that have K/V, by closure from the roots."""
        holds: set[tuple[str, Ids]] = set()
        for held in (*self.out, *self.rows, *self.adopted):
            if held is not without:
                whole = (*held.before, *held.ids)
                if held in self.adopted and self.tree.max_entries is not None:
                    # A cap on entries takes a leaf's ids; a buffer that others need for the rest stays.
                    whole = whole[: held.cover.length]  # type: ignore[union-attr]
                holds |= {(held.space, whole[:n]) for n in range(len(held.before) + 1, len(whole) + 1)}
        return {(s, p) for s, p in holds if all((s, p[:n]) in holds for n in range(1, len(p)))}

    def longest(self, space: str, ids: Ids) -> int:
        have = self.there()
        return max((n for n in range(1, len(ids) + 1) if (space, ids[:n]) in have), default=0)

    def free(self, handles: list[Any]) -> None:
        assert len(set(map(id, handles))) == len(handles), "a handle came back twice"
        for handle in handles:
            if isinstance(handle, Row):
                assert handle in self.adopted
                self.adopted.discard(handle)
            else:
                assert handle in self.out, "a handle that the tree doesn't hold"
                self.out.discard(handle)

    def tick(self) -> float:
        self.now += 1
        self.before = self.there()
        return self.now

    def remember(self) -> None:
        """What went since `tick`, as far as a miss can see it."""
        after = self.there()
        went = {(s, p) for s, p in self.before - after if len(p) == 1 or (s, p[:-1]) in after}
        self.lost = {(s, p) for s, p in self.lost if not any(s == t and p[: len(q)] == q for t, q in went)}
        self.lost |= went

    def make_cuts(self, result: Any, again: Any) -> Any:
        """Make the cuts that a call asks for, then call again."""
        while isinstance(result, Cut):
            old: Held = result.segment.handle
            assert 0 < result.at < len(old.ids)
            first = Held(old.space, old.before, old.ids[: result.at], result.at * SIZE)
            rest = Held(
                old.space, old.before + first.ids, old.ids[result.at :], SIZE * (len(old.ids) - result.at)
            )
            self.out |= {first, rest}
            self.free(self.tree.cut(result, (first, first.size), (rest, rest.size), self.now))
            result = again()
        return result

    # What happens

    @rule(space=SPACES, ids=IDS)
    def insert(self, space: str, ids: Ids) -> None:
        """Segments for all that no segment holds, and one too many."""
        now = self.tick()
        whole = ids_of(ids)
        kept = {(h.space, h.before + h.ids[:n]) for h in self.out if h.ids for n in range(1, len(h.ids) + 1)}
        if not all(
            (space, ids[:n]) in kept or not self.by_row(space, ids[:n]) for n in range(1, len(ids) + 1)
        ):
            return
        at = max((n for n in range(1, len(ids) + 1) if (space, ids[:n]) in kept), default=0)
        new = [
            Held(space, ids[:n], ids[n : n + 4], SIZE * len(ids[n : n + 4])) for n in range(at, len(ids), 4)
        ]
        self.out |= set(new)
        self.before = self.there()
        stored = [(held, len(held.ids), held.size) for held in new]
        freed = self.make_cuts(
            insert(self.tree, space, whole, stored, now), lambda: insert(self.tree, space, whole, stored, now)
        )
        if not self.capped:
            assert freed == []
        self.free(freed)
        self.remember()

    def by_row(self, space: str, prefix: Ids) -> bool:
        return any(
            r.space == space and tuple(r.ids[: len(prefix)]) == prefix for r in (*self.rows, *self.adopted)
        )

    @rule(space=SPACES)
    @precondition(lambda self: len(self.rows) < 4)
    def lend(self, space: str) -> None:
        row = Row(space, None)
        row.cover = self.tree.lend(space, row)
        self.rows.append(row)

    @rule(data=st.data(), ids=IDS)
    @precondition(lambda self: self.rows)
    def extend(self, data: st.DataObject, ids: Ids) -> None:
        row = data.draw(st.sampled_from(self.rows))
        now = self.tick()
        whole = [*row.ids, *ids]
        row.ids = whole
        self.before = self.there()

        def go() -> Cut | None:
            return self.tree.extend(row.cover, ids_of(whole[row.cover.length :]), now)

        self.make_cuts(go(), go)
        assert row.cover.length == len(whole)
        self.remember()

    @rule(data=st.data())
    @precondition(lambda self: self.rows)
    def shed(self, data: st.DataObject) -> None:
        """Nothing is lost; what only a live row need hold is little, but for what others or pins need."""
        row = data.draw(st.sampled_from(self.rows))
        have, now = self.there(), self.tick()
        freed = self.tree.shed(row.cover, now)
        assert all(isinstance(handle, Row) or handle.ids for handle in freed) or self.capped
        self.free(freed)
        if not self.capped:
            assert self.there() == have
        ids, size = self.tree._held_twice()
        assert size == ids * SIZE
        own = [node.segments[-1] for node in row.cover.path() if node.segments]
        spare = ids <= self.tree.tokens * tree_module.SPARE
        assert spare or self.pins or not any(s.end <= row.cover.length for s in own)
        self.remember()

    @rule(data=st.data(), slack=st.integers(0, 5))
    @precondition(lambda self: self.rows)
    def adopt(self, data: st.DataObject, slack: int) -> None:
        row = data.draw(st.sampled_from(self.rows))
        now = self.tick()
        self.rows.remove(row)
        self.adopted.add(row)
        size = SIZE * (len(row.ids) + slack)
        self.free(self.tree.adopt(row.cover, row, size, now))
        row.size = size
        self.remember()

    @rule(data=st.data(), most=st.integers(1, 9))
    @precondition(lambda self: self.adopted or self.rows)
    def pack(self, data: st.DataObject, most: int) -> None:
        row = data.draw(st.sampled_from([*self.rows, *sorted(self.adopted, key=lambda row: row.number)]))
        now = self.tick()
        new = [
            Held(row.space, tuple(row.ids[:at]), tuple(row.ids[at : at + count]), count * SIZE)
            for at, count in self.tree.unpacked(row.cover)[:most]
        ]
        self.out |= set(new)
        freed = self.tree.pack(row.cover, [(held, len(held.ids), held.size) for held in new], now)
        if not self.capped:
            whole = row in self.adopted and not self.tree.unpacked(row.cover)
            assert freed == ([row] if whole else [])
        self.free(freed)
        self.remember()

    @rule(data=st.data())
    @precondition(lambda self: self.rows)
    def drop(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        now = self.tick()
        needed = any(
            (space, ids[:n]) not in self.there(without=row)
            for _, match, space, ids in self.pins
            for n in range(1, match.usable + 1)
        )
        try:
            freed = self.tree.drop(row.cover, now)
        except TreeError:
            assert needed
            return
        assert not needed
        self.rows.remove(row)
        if self.capped:
            self.free(freed)
        else:
            self.free_exactly(freed)
        self.remember()

    def free_exactly(self, freed: list[Any]) -> None:
        """Nothing was freed but what hangs on nothing any more."""
        have = self.there()
        cut_off = {h for h in self.out if (h.space, (*h.before, *h.ids)) not in have}
        assert cut_off == set(freed)
        self.free(freed)
        self.remember()

    @rule(data=st.data(), most=st.integers(0, 300))
    def evict(self, data: st.DataObject, most: int) -> None:
        now = self.tick()
        possible, held = self.tree.evictable, self.tree.bytes
        freed = self.tree.evict(most, now)
        assert held - self.tree.bytes >= min(most, possible)
        assert held - self.tree.bytes <= possible
        if most == 0:
            assert freed == []
        self.free(freed)
        self.remember()

    @rule(space=SPACES, ids=IDS)
    @precondition(lambda self: len(self.pins) < 3)
    def pin(self, space: str, ids: Ids) -> None:
        match = self.tree.match(space, ids_of(ids))
        self.pins.append((self.tree.pin(match, self.tick()), match, space, ids))

    @rule(data=st.data())
    @precondition(lambda self: self.pins)
    def unpin(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.pins) - 1))
        pin, *_ = self.pins.pop(index)
        self.free(self.tree.unpin(pin, self.tick()))
        self.remember()
        with pytest.raises(TreeError):
            self.tree.unpin(pin, self.now)

    @rule(space=SPACES, ids=IDS)
    def match(self, space: str, ids: Ids) -> None:
        match = self.tree.match(space, ids_of(ids))
        length = self.longest(space, ids)
        assert match.length == length
        states = [
            len(h.before)
            for h in self.out
            if not h.ids and h.space == space and h.before == ids[: len(h.before)]
        ]
        usable = max(states, default=0) if self.stateful else length
        assert match.usable == usable
        self.read(match, space, ids)
        if match.usable == len(ids):
            assert match.why == "whole"
        elif match.usable < match.length:
            assert match.why in ("no checkpoint", "evicted")
        elif (space, ids[: length + 1]) in self.lost:
            assert match.why == "evicted"
        elif self.longest("b" if space == "a" else "a", ids) >= min(len(ids), length + 4):
            assert match.why == "other namespace"
        else:
            assert match.why == f"diverged at token {length}"

    def read(self, match: Any, space: str, ids: Ids) -> None:
        """What the pieces hold, one after the other, is the matched ids, and from the right place."""
        found: list[int] = []
        for handle, start, count in self.tree.pieces(match):
            assert handle.space == space
            if isinstance(handle, Held):
                assert handle.before == ids[: len(found)]
                assert start == 0
            else:
                assert start == len(found)
            found += handle.ids[start : start + count]
        assert tuple(found) == ids[: match.usable]

    @rule(space=SPACES, ids=IDS)
    @precondition(lambda self: len(self.rows) < 4)
    def take_over(self, space: str, ids: Ids) -> None:
        """A new row gets what it can start from: as many bytes go as were promised, and it is all there."""
        match = self.tree.match(space, ids_of(ids))
        self.read(match, space, ids)
        now, have, held = self.tick(), self.there(), self.tree.bytes
        promised = self.tree.reusable(match)
        row = Row(space, None, list(ids[: match.usable]))
        row.cover = self.tree.lend(space, row)
        self.rows.append(row)
        assert self.tree.extend(row.cover, ids_of(row.ids), now) is None, "its path is there: nothing to cut"
        freed = self.tree.give(row.cover)
        spent = [handle for handle in freed if isinstance(handle, Row)]
        went = sum(handle.size for handle in freed if handle in spent or len(handle.before) < match.usable)
        assert went == promised or (self.pins and went < promised), "others still read some"
        self.free(freed)
        assert held - self.tree.bytes >= went
        lost = have - self.there()
        assert all(any(tuple(r.ids[: len(p)]) == p for r in spent) for _, p in lost), (
            "only what they held beyond"
        )
        assert not any(p == ids[: len(p)] and len(p) <= match.usable for s, p in lost if s == space)
        for other in spent:
            assert len(other.ids) <= match.usable * (1 + tree_module.BEYOND)
        self.remember()

    # What holds

    @invariant()
    def the_laws(self) -> None:
        if not hasattr(self, "tree"):
            return
        check(self.tree)
        have = self.there()
        assert self.tree.tokens == len(have)
        for held in self.out:
            whole = (*held.before, *held.ids)
            assert all((held.space, whole[:n]) in have for n in range(1, len(whole) + 1)), "an orphan"
        assert self.tree.bytes == sum(held.size for held in (*self.out, *self.adopted))
        for _, match, space, ids in self.pins:
            self.read(match, space, ids)
        if self.tree.max_bytes is not None:
            assert self.tree.bytes <= max(self.tree.max_bytes, self.tree.bytes - self.tree.evictable)
        if self.tree.max_entries is not None and not self.pins and not self.rows:
            assert self.tree.entries <= self.tree.max_entries


class StatefulTreeMachine(TreeMachine):
    stateful = True

    @rule(data=st.data(), size=st.integers(1, 60), anchor=st.booleans())
    @precondition(lambda self: any(row.ids for row in self.rows))
    def keep(self, data: st.DataObject, size: int, anchor: bool) -> None:
        row = data.draw(st.sampled_from([row for row in self.rows if row.ids]))
        position = data.draw(st.integers(1, len(row.ids)))
        now = self.tick()
        held = Held(row.space, tuple(row.ids[:position]), (), size)
        self.out.add(held)
        self.free(self.tree.keep(row.cover, position, held, size, now, anchor))
        self.remember()


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestStatefulTree = StatefulTreeMachine.TestCase
TestStatefulTree.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
