"""What the prefix tree is made of: nodes with their runs of ids, what covers them, and who holds on to them.

A node's ids are bytes, four an id, so that whole runs are compared at memory speed and in full. Positions
count ids from the namespace's root, so a split moves none. Knows no policy and no total: `tree` keeps both.
Invariant: a node's K/V is in its segments up to `packed` and in rows' buffers beyond, without a gap.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

WIDTH = 4
"""Bytes of an id, as in array('I')."""


@dataclass(slots=True, eq=False)
class Segment:
    """K/V of the ids from position `start` to `end`, in `size` bytes behind an opaque handle."""

    handle: Any
    start: int
    end: int
    size: int


@dataclass(slots=True, eq=False)
class Checkpoint:
    """The state after `position` ids, for layers that can't be cut; anywhere in a node's run.

    `anchor`: where others are expected to leave this path, so thinning by distance spares it.
    """

    handle: Any
    position: int
    size: int
    used: float
    anchor: bool = False
    hits: int = 0


@dataclass(slots=True, eq=False)
class Claim:
    """A path: the first `length` positions, ending in `node`. Every node of the path knows the claim."""

    node: Node
    length: int = 0

    def path(self) -> Iterator[Node]:
        return up(self.node)


@dataclass(slots=True, eq=False)
class Pin(Claim):
    """Forbids eviction of a path and of the checkpoint that is being read."""

    checkpoint: Checkpoint | None = None


@dataclass(slots=True, eq=False)
class Cover(Claim):
    """A row's buffers, which hold K/V of a whole path: position p of the tree is position p of the row.

    Borrowed while the row lives: no bytes of the tree's. Adopted when it has ended: `size`, by capacity.
    """

    handle: Any = None
    size: int = 0
    live: bool = True


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """A run of ids from position `start` on. `children` by their first id, all at the run's end."""

    parent: Node | None
    start: int
    ids: bytearray
    used: float = 0
    hits: int = 0
    branches: int = 0
    """Children there ever were: what was continued in several ways will be again."""
    children: dict[bytes, Node] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    covers: list[Cover] = field(default_factory=list)
    ghosts: dict[tuple[int, bytes], None] = field(default_factory=dict)
    """What was evicted from here, by (position, next id); a checkpoint has no next id."""

    @property
    def end(self) -> int:
        return self.start + len(self.ids) // WIDTH

    @property
    def packed(self) -> int:
        """Up to where segments hold its K/V."""
        return self.segments[-1].end if self.segments else self.start

    @property
    def pinned(self) -> int:
        """Up to where pins forbid to drop anything."""
        return min(self.end, max((pin.length for pin in self.pins), default=self.start))

    def available(self, without: Cover | Segment | None = None) -> int:
        """Up to where K/V is there, or would be if `without`, a cover or the last segment, were gone."""
        packed = without.start if isinstance(without, Segment) else self.packed
        return min(self.end, max([packed, *(c.length for c in self.covers if c is not without)]))

    def id_at(self, position: int) -> bytes:
        offset = (position - self.start) * WIDTH
        return bytes(self.ids[offset : offset + WIDTH])

    def above(self, length: int) -> Node:
        """The node on the way to here in which the first `length` positions end; the root for none."""
        node = self
        while node.parent is not None and node.start >= length:
            node = node.parent
        return node

    def deepest(self, limit: int) -> Checkpoint | None:
        """Its deepest checkpoint at or before `limit`."""
        found = max((p for p in self.checkpoints if p <= limit), default=None)
        return None if found is None else self.checkpoints[found]

    def inside(self, at: int) -> Segment | None:
        """The segment that a split at `at` would go through."""
        index = bisect_right(self.segments, at, key=lambda segment: segment.start) - 1
        found = self.segments[index] if index >= 0 else None
        return found if found is not None and found.start < at < found.end else None

    def split(self, at: int) -> Node:
        """Make its ids before `at` a node of their own, above it, and return that. Cuts no segment."""
        assert self.parent is not None
        assert self.inside(at) is None
        offset = (at - self.start) * WIDTH
        upper = Node(self.parent, self.start, self.ids[:offset], self.used, self.hits, branches=1)
        self.parent.children[self.id_at(self.start)] = upper
        upper.children[self.id_at(at)] = self
        index = bisect_left(self.segments, at, key=lambda segment: segment.start)
        upper.segments, self.segments = self.segments[:index], self.segments[index:]
        upper.checkpoints = {p: kept for p, kept in self.checkpoints.items() if p <= at}
        self.checkpoints = {p: kept for p, kept in self.checkpoints.items() if p > at}
        upper.ghosts = {ghost: None for ghost in self.ghosts if ghost[0] <= at}
        self.ghosts = {ghost: None for ghost in self.ghosts if ghost[0] > at}
        upper.pins, upper.covers = self.pins, self.covers
        for claim in (*upper.pins, *upper.covers):
            if claim.length <= at:
                claim.node = upper
        self.pins = [pin for pin in upper.pins if pin.length > at]
        self.covers = [cover for cover in upper.covers if cover.length > at]
        del self.ids[:offset]
        self.parent, self.start = upper, at
        return upper


def common(data: memoryview, at: int, ids: bytearray, offset: int = 0) -> int:
    """How many ids of `ids` from byte `offset` on equal those of `data` from byte `at` on.

    By memory comparisons of doubling length, then by halving: no id is looked at by itself.
    """
    limit = min(len(ids) - offset, len(data) - at)
    low, step = 0, 256
    while low < limit and ids.startswith(data[at + low : at + min(low + step, limit)], offset + low):
        low, step = min(low + step, limit), step * 2
    high = min(low + step, limit)
    while low < high:
        middle = (low + high + 1) // 2
        if ids.startswith(data[at + low : at + middle], offset + low):
            low = middle
        else:
            high = middle - 1
    return low // WIDTH


def enter(data: memoryview, at: int, child: Node) -> int:
    """How many ids of a child, whose first is the one at byte `at`, `data` has."""
    size = len(child.ids)
    whole = size <= len(data) - at and child.ids.startswith(data[at : at + size])
    return size // WIDTH if whole else common(data, at, child.ids)


def walk(root: Node, data: memoryview) -> tuple[Node, int]:
    """The deepest node that `data` (ids as bytes) enters from the root, and how many ids of it are there."""
    node, at = root, 0
    while at < len(data) and (child := node.children.get(bytes(data[at : at + WIDTH]))) is not None:
        node = child
        at += enter(data, at, child) * WIDTH
        if at < child.end * WIDTH:
            break
    return node, at // WIDTH


def up(node: Node) -> Iterator[Node]:
    """A node and all above it, without the root."""
    while node.parent is not None:
        yield node
        node = node.parent


def below(node: Node) -> list[Node]:
    """All nodes under one, without it, parents before children."""
    found = list(node.children.values())
    for each in found:
        found.extend(each.children.values())
    return found
