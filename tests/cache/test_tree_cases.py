"""Single cases of the prefix tree: what a split costs, who is evicted first, why a miss is a miss."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from tests.support.tree_laws import check, insert

from penstock.cache.tree import SEGMENT, Cut, Tree, TreeError
from penstock.cache.value import likelihood


def ids(*runs: tuple[int, int]) -> array[int]:
    """Runs of (first, count) consecutive numbers."""
    return array("I", [number for first, count in runs for number in range(first, first + count)])


def put(tree: Tree, sequence: array[int], now: float, name: str = "s", space: str = "") -> list[Any]:
    """Store what is missing of a sequence, a byte an id; handles are (name, first id's position)."""
    row = tree.lend(space, name)
    while (cut := tree.extend(row, sequence[row.length :], now)) is not None:
        rest = cut.segment.end - cut.segment.start - cut.at
        tree.cut(cut, ((name, "first"), cut.at), ((name, "rest"), rest), now)
    return tree.drop(row, now, [((name, at), count, count) for at, count in tree.unpacked(row)])


def test_a_split_copies_one_segment_at_most() -> None:
    tree = Tree()
    long = ids((0, 60_000))
    put(tree, long, 0)
    other = long[:30_000] + ids((100_000, 1_000))
    runs = [(n, 500, 500) for n in range(2)]
    cut = insert(tree, "", other, runs, 1)
    assert isinstance(cut, Cut)
    assert cut.segment.end - cut.segment.start <= SEGMENT
    assert cut.segment.start + cut.at == 30_000
    assert (tree.bytes, tree.tokens) == (60_000, 60_000), "nothing has changed yet"
    assert tree.cut(cut, ("a", cut.at), ("b", SEGMENT - cut.at), 1) == [cut.segment.handle]
    assert insert(tree, "", other, runs, 1) == []
    assert (tree.bytes, tree.tokens, tree.entries) == (61_000, 61_000, 2)
    check(tree)
    at_border = long[: SEGMENT * 10] + ids((200_000, 10))
    assert insert(tree, "", at_border, [("c", 10, 10)], 1) == [], "between segments it is free"


def test_a_split_between_what_is_packed_and_what_is_not() -> None:
    tree = Tree()
    row = tree.lend("", "row")
    tree.extend(row, ids((0, 1_000)), 1)
    tree.pack(row, [("a", 512, 512)], 1)
    other = tree.lend("", "other")
    assert tree.extend(other, ids((0, 512), (5_000, 10)), 1) is None
    assert tree.unpacked(row) == [(512, 488)]
    check(tree)


def test_what_hangs_at_a_split_stays_above_it() -> None:
    tree = Tree(stateful=True)
    row = tree.lend("", "row")
    tree.extend(row, ids((0, 100)), 1)
    tree.keep(row, 60, "state", 5, 1)
    first, second = tree.lend("", "first"), tree.lend("", "second")
    tree.extend(first, ids((0, 80), (8_000, 10)), 1)
    tree.extend(second, ids((0, 60), (9_000, 10)), 1)
    assert tree.match("", ids((0, 60), (9_000, 10))).usable == 60
    check(tree)
    dense = Tree()
    insert(dense, "", ids((0, 100)), [("a", 80, 80), ("b", 20, 20)], 1)
    assert dense.evict(1, 1) == ["b"]
    dense.extend(dense.lend("", "row"), ids((0, 80), (7_000, 10)), 1)
    assert dense.match("", ids((0, 100))).why == "evicted"
    dense.extend(dense.lend("", "other"), ids((0, 80), (8_000, 10)), 1)
    assert dense.match("", ids((0, 100))).why == "evicted"
    check(dense)


def test_a_session_in_use_outlives_an_abandoned_one() -> None:
    tree = Tree()
    shared = ids((0, 1_024))
    put(tree, shared + ids((10_000, 512)), 1, "abandoned")
    put(tree, shared + ids((20_000, 512)), 2, "in use")
    for now in range(3, 6):
        tree.unpin(tree.pin(tree.match("", shared + ids((20_000, 512))), now), now)
    assert tree.evict(512, 9) == [("abandoned", 1_024)]
    assert tree.evict(1, 9) == [("in use", 1_024)], "what is shared goes last"
    assert tree.tokens == 1_024


def test_likelihood() -> None:
    assert likelihood(0, 5) < likelihood(3, 5), "longer sessions go on"
    assert likelihood(40, 500) < likelihood(0, 1), "but not when they have long been silent"
    assert likelihood(1, 5, branches=1) < likelihood(1, 5, branches=4)


def test_why_a_miss_is_a_miss() -> None:
    tree = Tree()
    sequence = ids((0, 2_000))
    put(tree, sequence, 1)
    assert tree.match("", sequence).why == "whole"
    assert tree.match("", sequence[:700]).why == "whole"
    assert tree.match("", sequence[:700] + ids((9_000, 5))).why == "diverged at token 700"
    assert tree.match("", ids((5, 5))).why == "diverged at token 0"
    assert tree.match("other", sequence).why == "other namespace"
    tree.evict(1, 2)
    found = tree.match("", sequence)
    assert (found.length, found.why) == (1_536, "evicted")
    assert tree.match("", sequence[:1_536] + ids((9_000, 5))).why == "diverged at token 1536"
    tree.evict(1 << 40, 2)
    assert tree.match("", sequence).why == "evicted"
    put(tree, sequence, 3)
    assert tree.match("", sequence).why == "whole"


def test_states_limit_a_hit() -> None:
    tree = Tree(stateful=True, state_tokens=10)
    sequence = ids((0, 1_000))
    row = tree.lend("", "row")
    tree.extend(row, sequence, 1)
    assert tree.keep(row, 300, "state", 50, 1) == []
    assert tree.keep(row, 300, "twice", 50, 1) == ["twice"]
    with pytest.raises(TreeError):
        tree.keep(row, 1_001, "beyond", 50, 1)
    match = tree.match("", sequence)
    assert (match.length, match.usable, match.why) == (1_000, 300, "no checkpoint")
    assert match.checkpoint is not None
    assert tree.pieces(match) == [("row", 0, 300)]
    pin = tree.pin(match, 2)
    assert tree.evict(1 << 40, 2) == [], "a pinned state stays"
    tree.unpin(pin, 2)
    assert tree.evict(1, 2) == ["state"]
    assert tree.match("", sequence).why == "evicted"


def test_a_sub_agent_hits_what_its_parent_has_computed_so_far() -> None:
    tree = Tree()
    parent = tree.lend("", "parent")
    tree.extend(parent, ids((0, 5_000)), 1)
    tree.extend(parent, ids((5_000, 1)), 1)
    assert tree.bytes == 0
    child = ids((0, 4_000), (9_000, 100))
    match = tree.match("", child)
    assert tree.pieces(match) == [("parent", 0, 4_000)]
    row = tree.lend("", "child")
    assert tree.extend(row, child, 2) is None, "a borrowed node is split for nothing"
    assert tree.drop(parent, 3) == []
    assert tree.match("", child).usable == 4_100, "the child lends what both had"
    assert tree.tokens == 4_100


def test_preemption_moves_and_packing_frees() -> None:
    tree = Tree()
    row = tree.lend("", "row")
    tree.extend(row, ids((0, 1_000)), 1)
    assert tree.adopt(row, "buffers", 1_500, 1) == []
    assert (tree.bytes, tree.tokens) == (1_500, 1_000), "charged by capacity"
    assert tree.unpacked(row) == [(0, 512), (512, 488)]
    assert tree.pack(row, [("a", 512, 512)], 2) == []
    assert tree.bytes == 2_012
    assert tree.pack(row, [("b", 488, 488)], 2) == ["buffers"]
    assert (tree.bytes, tree.tokens) == (1_000, 1_000)


def test_what_a_live_row_holds_too_goes_first() -> None:
    tree = Tree()
    put(tree, ids((0, 1_024)), 9, "held twice")
    put(tree, ids((5_000, 1_024)), 1, "old")
    row = tree.lend("", "row")
    tree.extend(row, ids((0, 1_030)), 9)
    assert {handle[0] for handle in tree.evict(1_024, 10)} == {"held twice"}
    assert tree.match("", ids((0, 1_024))).usable == 1_024


def test_caps_hold_on_every_path() -> None:
    tree = Tree(max_bytes=2_000, max_entries=2)
    for number in range(5):
        put(tree, ids((number * 10_000, 700)), number)
        assert tree.bytes <= 2_000
        assert tree.entries <= 2
    row = tree.lend("", "row")
    tree.extend(row, ids((90_000, 900)), 6)
    assert tree.entries <= 2
    freed = tree.adopt(row, "row", 1_900, 7)
    assert tree.bytes <= 2_000
    assert freed
    pin = tree.pin(tree.match("", ids((90_000, 900))), 8)
    put(tree, ids((70_000, 512)), 8)
    assert tree.bytes == 1_900, "the newcomer goes where a pin holds the rest"
    tree.unpin(pin, 9)


def test_caps_hold_when_a_pin_goes_and_when_halves_are_larger() -> None:
    tree = Tree(max_bytes=1_000)
    row = tree.lend("", "row")
    tree.extend(row, ids((0, 900)), 1)
    pin = tree.pin(tree.match("", ids((0, 900))), 1)
    assert tree.adopt(row, "row", 1_200, 1) == []
    assert tree.evictable == 0
    assert tree.evict(1, 1) == []
    assert tree.unpin(pin, 2) == ["row"]
    insert(tree, "", ids((0, 512)), [("a", 512, 990)], 3)
    cut = insert(tree, "", ids((0, 100), (9_000, 1)), [("b", 1, 1)], 4)
    assert isinstance(cut, Cut)
    assert set(tree.cut(cut, ("c", 500), ("d", 510), 4)) == {"a", "d"}


def test_shedding_spares_what_pins_read_and_what_the_row_has_not() -> None:
    tree = Tree()
    sequence = ids((0, 1_024))
    put(tree, sequence, 1)
    row = tree.lend("", "row")
    tree.extend(row, sequence[:700], 2)
    assert tree.unpacked(row) == []
    pin = tree.pin(tree.match("", sequence[:700]), 2)
    assert tree.evict(1, 2) == []
    tree.unpin(pin, 2)
    assert tree.evict(1, 2) == [("s", 0)], "the second segment has ids that the row has not"
    assert tree.match("", sequence).why == "whole"
    assert tree.unpacked(row) == [(0, 512)]
    other = tree.lend("", "other")
    tree.extend(other, ids((5_000, 10)), 3)
    short = tree.lend("", "short")
    tree.extend(short, ids((5_000, 5)), 3)
    assert tree.unpacked(short) == [], "the other row holds it, too"
    assert tree.drop(other, 3) == []
    assert tree.unpacked(short) == [(0, 5)], "no further than the row goes"
    check(tree)


def test_buffers_that_others_hang_on_go_after_them() -> None:
    tree = Tree()
    shared, own = ids((0, 512)), ids((0, 512), (9_000, 512))
    put(tree, own, 1, "branch")
    row = tree.lend("", "row")
    tree.extend(row, shared + ids((5_000, 100)), 1)
    assert tree.evict(1, 1) == [("branch", 0)], "the row has it too"
    tree.adopt(row, "buffers", 612, 1)
    tree.unpin(tree.pin(tree.match("", own), 50), 50)
    assert tree.evict(1, 51) == [("branch", 512)]
    assert tree.evict(1, 51) == ["buffers"]
    assert tree.tokens == 0


def test_what_is_held_twice_by_rows_goes_without_loss() -> None:
    tree = Tree()
    put(tree, ids((7_000, 100)), 0)
    row, other = tree.lend("", "row"), tree.lend("", "other")
    tree.extend(row, ids((0, 100)), 5)
    tree.extend(other, ids((0, 100)), 5)
    assert tree.adopt(row, "buffers", 150, 5) == ["buffers"], "the other lends it"
    assert tree.tokens == 200
    tree.adopt(other, "others", 150, 5)
    again = tree.lend("", "again")
    tree.extend(again, ids((0, 90)), 6)
    assert tree.shed(again, 6) == []
    tree.extend(again, ids((90, 20)), 6)
    assert tree.shed(again, 6) == ["others"]
    assert (tree.bytes, tree.tokens) == (100, 210)


def test_states_go_with_their_ids_and_thinning_spares_others() -> None:
    tree = Tree(stateful=True, state_tokens=100)
    row = tree.lend("", "row")
    tree.extend(row, ids((0, 1_000)), 1)
    for position in (300, 955, 970, 980, 990, 1_000):
        tree.keep(row, position, position, 1, 1)
    other = tree.lend("", "other")
    tree.extend(other, ids((0, 960)), 1)
    assert tree.keep(other, 960, 960, 1, 1) == [], "what lies deeper is another's"
    pin = tree.pin(tree.match("", ids((0, 960))), 1)
    tree.extend(row, ids((1_000, 50)), 1)
    assert 960 not in [freed for n in range(1_001, 1_010) for freed in tree.keep(row, n, n, 1, 1)]
    tree.unpin(pin, 1)
    freed = tree.drop(row, 1)
    assert 1_009 in freed
    assert all(position > 960 for position in freed), "the other row's stay"
    check(tree)


def test_misuse_is_an_error() -> None:
    tree = Tree()
    row = tree.lend("", "row")
    tree.extend(row, ids((0, 10)), 1)
    with pytest.raises(TreeError):
        insert(tree, "", ids((0, 20)), [("a", 5, 5)], 1)
    with pytest.raises(TreeError):
        tree.pack(row, [("a", 11, 11)], 1)
    pin = tree.pin(tree.match("", ids((0, 10))), 1)
    with pytest.raises(TreeError):
        tree.drop(row, 1)
    tree.adopt(row, "row", 10, 1)
    with pytest.raises(TreeError):
        tree.extend(row, ids((10, 1)), 1)
    with pytest.raises(TreeError):
        tree.adopt(row, "row", 10, 1)
    tree.unpin(pin, 1)
    tree.drop(row, 1)
    with pytest.raises(TreeError):
        tree.drop(row, 1)
    check(tree)
