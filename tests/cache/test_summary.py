"""What is told of the tree; that its sums are the tree's is a law that every walk of `tree_laws` checks."""

from __future__ import annotations

from array import array

from tests.support.tree_laws import insert

from penstock.cache.summary import summary
from penstock.cache.tree import Tree

SHARED, LONG, SHORT = list(range(100)), list(range(1000, 1400)), list(range(2000, 2010))


def ids(*parts: list[int]) -> array[int]:
    return array("I", [id for part in parts for id in part])


def tree_of_two() -> Tree:
    """A shared prefix with a long and a short continuation; the short one is a live row's."""
    tree = Tree()
    insert(tree, "", ids(SHARED), [("shared", 100, 1000)], 1)
    insert(tree, "", ids(SHARED, LONG), [("long", 400, 4000)], 2)
    tree.extend(tree.lend("", "row"), ids(SHARED, SHORT), 3)
    return tree


def test_nodes_are_told_with_what_they_hang_from() -> None:
    told = summary(tree_of_two(), 5)
    assert [(n.parent, n.start, n.tokens, n.bytes, n.borrowed) for n in told.tree] == [
        (None, 0, 100, 1000, True),
        (0, 100, 400, 4000, False),
        (0, 100, 10, 0, True),
    ]
    assert [n.age for n in told.tree] == [2, 2, 2]
    assert (told.tokens, told.nodes, told.entries) == (510, 3, 1)


def test_the_largest_are_told_and_the_others_counted() -> None:
    told = summary(tree_of_two(), 5, most=1)
    assert [(n.parent, n.tokens) for n in told.tree] == [(None, 400)], "its parent is not told of"
    assert told.nodes == 3


def test_what_hangs_below_one_that_is_not_told_of_names_the_next_above() -> None:
    tree = Tree()
    insert(tree, "", ids(LONG), [("a", 400, 4000)], 1)
    insert(tree, "", ids(LONG, SHORT), [("b", 10, 100)], 2)
    for first in (1, 2):
        insert(tree, "", ids(LONG, SHORT, [first], LONG), [(f"c{first}", 401, 4010)], 3)
    told = summary(tree, 3, most=3)
    assert [(n.parent, n.start) for n in told.tree] == [(None, 0), (0, 410), (0, 410)]


def test_rows_that_run_count_as_their_length_though_the_tree_has_no_bytes_of_them() -> None:
    tree = Tree()
    insert(tree, "", ids(SHORT), [("short", 10, 100)], 1)
    tree.extend(tree.lend("", "row"), ids(LONG), 2)
    assert [n.tokens for n in summary(tree, 2, most=1).tree] == [400]


def test_an_empty_tree() -> None:
    told = summary(Tree(), 0)
    assert (told.tokens, told.nodes, told.entries, told.tree) == (0, 0, 0, [])
