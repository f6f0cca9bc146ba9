"""The prefix tree's laws, checked by walking all of it; and segments put into it as tests need them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from penstock.cache.nodes import WIDTH, Node, below
from penstock.cache.summary import summary
from penstock.cache.tree import Cut, Stored, Tree, TreeError


def check(tree: Tree) -> None:
    """Raises AssertionError where a law is broken."""
    tokens, size, leaves = 0, 0, []
    for root in tree._roots.values():
        assert root.start == root.end == 0
        assert not [*root.segments, *root.checkpoints, *root.covers, *root.pins]
        for node in below(root):
            check_node(tree, node)
            tokens += node.end - node.start
            size += sum(s.size for s in node.segments) + sum(c.size for c in node.checkpoints.values())
            leaves += [] if node.children else [node]
    assert tokens == tree.tokens
    assert size + sum(cover.size for cover in tree._covers) == tree.bytes
    assert set(leaves) == set(tree._leaves)
    for claim in (*tree._covers, *tree._pins):
        assert claim.node.start < claim.length <= claim.node.end or claim.length == 0 == claim.node.end
        for node in claim.path():
            assert claim in node.covers or claim in node.pins
    assert 0 <= tree.evictable <= tree.bytes
    check_summary(tree)


def check_summary(tree: Tree) -> None:
    whole = summary(tree, 0.0, most=1 << 30)
    assert sum(node.tokens for node in whole.tree) == tree.tokens == whole.tokens
    assert sum(node.bytes for node in whole.tree) == tree.bytes
    assert sum(node.checkpoints for node in whole.tree) == whole.checkpoints
    ends = {node.id: node.start + node.tokens for node in whole.tree}
    assert all(node.start == (0 if node.parent is None else ends[node.parent]) for node in whole.tree)
    told = summary(tree, 0.0, most=2)
    assert (len(told.tree), told.nodes) == (min(2, whole.nodes), len(whole.tree))
    assert all(node.parent is None or node.parent < node.id for node in told.tree)


def check_node(tree: Tree, node: Node) -> None:
    parent = node.parent
    assert parent is not None
    assert node.start == parent.end < node.end
    assert parent.children[node.id_at(node.start)] is node
    assert len(node.ids) % WIDTH == 0
    assert node.available() == node.end, "ids without K/V"
    at = node.start
    for segment in node.segments:
        assert segment.start == at < segment.end
        at = segment.end
    assert at <= node.end
    for position, kept in node.checkpoints.items():
        assert node.start < position == kept.position <= node.end
    for claim in (*node.pins, *node.covers):
        assert claim.length > node.start
        assert node in list(claim.path())
    assert all(pin in tree._pins for pin in node.pins)
    assert all(cover in tree._covers for cover in node.covers)
    for pin in node.pins:
        if pin.checkpoint is not None and node.start < pin.checkpoint.position <= node.end:
            assert node.checkpoints[pin.checkpoint.position] is pin.checkpoint, "a pinned checkpoint is gone"
    for position, _ in node.ghosts:
        assert node.start < position <= node.end


def insert(
    tree: Tree, namespace: str, ids: array[int], stored: Sequence[Stored], now: float
) -> Cut | list[Any]:
    """Keep segments of the last ids of `ids`; the first must be in segments. If a Cut, do that first.

    Segments of ids that have one already come back at once. Raises TreeError for a gap or an overlap.
    """
    cover = tree.lend(namespace, None)
    freed: list[Any] = []
    try:
        if (cut := tree.extend(cover, ids, now)) is not None:
            return cut
        missing = tree.unpacked(cover)
        at, new = len(ids) - sum(length for _, length, _ in stored), list(stored)
        while new and at < (missing[0][0] if missing else len(ids)):
            at += new[0][1]
            freed.append(new.pop(0)[0])
        if missing and at != missing[0][0]:
            raise TreeError(f"segments from {at} on, where {missing[0][0]} is next")
        tree._pack(cover, new)
    finally:
        tree._remove(cover, freed)
    return tree._within_caps(now, freed)
