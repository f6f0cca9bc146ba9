"""What is told of the tree: its totals, and the largest of its nodes with what hangs where. Pure.

Never an id of a prompt: positions, counts and bytes. One walk over all nodes; the caller chooses how often.
Invariant: bytes of all nodes add up to the tree's, and a node comes after the one it names as its parent.
"""

from __future__ import annotations

from heapq import nlargest

from penstock.cache.holdings import Holdings, total
from penstock.cache.nodes import Node, up
from penstock.wire import Cached, Prefix

MOST = 50
"""Nodes that are told of."""


def summary(tree: Holdings, now: float, most: int = MOST) -> Cached:
    """The books of a tree and its `most` largest nodes; `now`: the tree's time."""
    nodes = tree.nodes()
    sizes = {node: _bytes(node) for node in nodes}
    # What only running rows hold has no bytes of the tree's yet: it counts as much as others of its length.
    each = tree.bytes / (sum(n.end - n.start for n in nodes if sizes[n]) or 1) or 1
    largest = nlargest(most, nodes, key=lambda n: max(sizes[n], each * (n.end - n.start)))
    ids = {node: number for number, node in enumerate(sorted(largest, key=lambda n: n.start))}
    told = [
        Prefix(
            id=number,
            parent=next((ids[above] for above in up(node) if above in ids and above is not node), None),
            start=node.start,
            tokens=node.end - node.start,
            bytes=sizes[node],
            checkpoints=len(node.checkpoints),
            hits=node.hits,
            age=int(now - node.used),
            borrowed=any(cover.live for cover in node.covers),
        )
        for node, number in ids.items()
    ]
    return Cached(
        tokens=tree.tokens,
        nodes=len(nodes),
        entries=tree.entries,
        checkpoints=sum(len(node.checkpoints) for node in nodes),
        tree=told,
    )


def _bytes(node: Node) -> int:
    """What is its own; the buffers of a row that has ended count where the row ended."""
    ended = [cover for cover in node.covers if cover.node is node]
    return total(node.segments) + total(node.checkpoints.values()) + total(ended)
