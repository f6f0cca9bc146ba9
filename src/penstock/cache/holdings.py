"""What the prefix tree holds, and what goes when bytes or entries are short. Pure.

Owns the nodes' totals, every way in which something leaves the tree, and the order of eviction: first what
is held twice, which loses nothing, then by worth (`value`). Refuses to touch what a pin needs.
Invariant: a node that loses K/V loses what hangs below it, and every handle that goes is returned once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Any

from penstock.cache.nodes import WIDTH, Checkpoint, Cover, Node, Pin, Segment, below
from penstock.cache.value import is_read, likelihood, worth

GHOSTS = 256
"""Evictions that a node remembers, so that a miss can say so."""

Victim = tuple[Node, Checkpoint | Cover | None]
"""What may be evicted: a node's checkpoint, an adopted cover that ends in it, or (None) its last segment."""


def total(things: Iterable[Segment | Checkpoint | Cover]) -> int:
    """Bytes."""
    return sum(thing.size for thing in things)


class Holdings:
    """The nodes of all namespaces with their totals: the tree less its ways in."""

    def __init__(
        self,
        stateful: bool = False,
        state_tokens: int = 0,
        max_bytes: int | None = None,
        max_entries: int | None = None,
    ) -> None:
        """`stateful`: rows start at checkpoints only, each as big as the K/V of `state_tokens` ids.

        `max_entries` counts sequences kept: leaves that no live row is on.
        """
        self.stateful, self.state_tokens = stateful, state_tokens
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.bytes = 0
        self.tokens = 0
        self.evicted_bytes = 0
        self._roots: dict[str, Node] = {}
        self._leaves: dict[Node, None] = {}
        self._covers: dict[Cover, None] = {}
        self._pins: dict[Pin, None] = {}

    @property
    def entries(self) -> int:
        """Sequences kept: leaves that no live row is on."""
        return len(self._leaves.keys() - {cover.node for cover in self._covers if cover.live})

    def nodes(self) -> list[Node]:
        """All nodes of all namespaces, each after the one above it."""
        return [node for root in self._roots.values() for node in below(root)]

    def evict(self, size: int, now: float) -> list[Any]:
        """Free `size` bytes, or all that may go: what is held twice first, then by worth."""
        freed: list[Any] = []
        self._evict(max(0, self.bytes - size), now, freed)
        return freed

    @property
    def evictable(self) -> int:
        """Bytes that `evict` could free now: all but what pins need."""
        nodes = {node for pin in self._pins for node in pin.path()}
        kept = {cover for node in nodes for cover in node.covers if is_read(cover)}
        states = {pin.checkpoint for pin in self._pins if pin.checkpoint is not None}
        held = sum(s.size for node in nodes for s in node.segments if s.start < node.pinned)
        return self.bytes - held - total(kept) - total(states)

    def _shed(self, cover: Cover, goal: int, freed: list[Any]) -> None:
        for node in list(cover.path()):
            whole = max((s.end for s in node.segments if s.end <= cover.length), default=node.start)
            held = node.split(whole) if node.start < whole < node.packed else node
            while self.bytes > goal and held.segments and held.packed <= cover.length:
                if held.segments[-1].start < held.pinned:
                    break
                self._pop_segment(held, freed)

    def _evict(self, goal: int, now: float, freed: list[Any]) -> None:
        bytes_before = self.bytes
        for cover in list(self._covers):
            if self.bytes > goal:
                self._shed(cover, goal, freed)
        heap: list[tuple[float, int, Victim]] = []
        order = count()

        def offer(victims: Iterable[Victim]) -> None:
            for victim in victims:
                if (score := self._worth(victim, now)) is not None:
                    heappush(heap, (score, next(order), victim))

        if self.bytes > goal:
            offer(self._victims())
        while self.bytes > goal and heap:
            score, _, victim = heappop(heap)
            current = self._worth(victim, now)
            if current is not None:
                offer([victim] if current > score else self._take(victim, freed))
        self.evicted_bytes += bytes_before - self.bytes

    def _victims(self) -> Iterator[Victim]:
        yield from ((leaf, None) for leaf in self._leaves)
        yield from ((cover.node, cover) for cover in self._covers)
        for node in self.nodes() if self.stateful else ():
            yield from ((node, kept) for kept in node.checkpoints.values())

    def _worth(self, victim: Victim, now: float) -> float | None:
        node, what = victim
        if what is None:
            there = node in self._leaves
        elif isinstance(what, Cover):
            there = not what.live and what in self._covers
        else:
            there = node.checkpoints.get(what.position) is what
        return worth(node, what, self.stateful, now) if there else None

    def _take(self, victim: Victim, freed: list[Any]) -> list[Victim]:
        """Evict; returns what may have become a candidate by that."""
        node, what = victim
        touched = [node] if node.parent is None else [node, node.parent]
        if what is None:
            self._pop_segment(node, freed)
            self._trim(node, freed)
        elif isinstance(what, Cover):
            touched = list(what.path())
            self._remove(what, freed)
        else:
            self._forget(node, what.position, freed)
            self._haunt(node, what.position, b"")
        return [pair for n in touched for pair in ((n, None), *((cover.node, cover) for cover in n.covers))]

    def _needed(self, cover: Cover) -> bool:
        return is_read(cover) or any(n.available(without=cover) < n.end for n in cover.path())

    def _within_caps(self, now: float, freed: list[Any]) -> list[Any]:
        if self.max_bytes is not None and self.bytes > self.max_bytes:
            self._evict(self.max_bytes, now, freed)
        bytes_before = self.bytes
        while self.max_entries is not None and self.entries > self.max_entries:
            free = [n for n in self._leaves if n.pinned == n.start and not any(c.live for c in n.covers)]
            if not free:
                break
            self._drop_leaf(min(free, key=lambda n: likelihood(n.hits, now - n.used, n.branches)), freed)
        self.evicted_bytes += bytes_before - self.bytes
        return freed

    def _drop_leaf(self, leaf: Node, freed: list[Any]) -> None:
        covers = list(leaf.covers)
        for cover in covers:
            self._retreat(cover, leaf.start, freed)
        if leaf in self._leaves:
            self._truncate(leaf, leaf.start, freed)
        for cover in covers:
            if not self._needed(cover):
                self._remove(cover, freed)

    def _remove(self, cover: Cover, freed: list[Any]) -> None:
        self._retreat(cover, 0, freed)
        del self._covers[cover]
        self.bytes -= cover.size
        if not cover.live:
            freed.append(cover.handle)

    def _retreat(self, cover: Cover, length: int, freed: list[Any]) -> None:
        """A cover ends at `length`, if it went beyond; what was only its own goes."""
        touched = list(cover.path())
        cover.length = min(cover.length, length)
        for node in touched:
            if node.start >= length:
                node.covers.remove(cover)
                cover.node = node.parent or node
            self._trim(node, freed)

    def _pop_segment(self, node: Node, freed: list[Any]) -> None:
        segment = node.segments.pop()
        self.bytes -= segment.size
        freed.append(segment.handle)

    def _forget(self, node: Node, position: int, freed: list[Any]) -> None:
        kept = node.checkpoints.pop(position)
        self.bytes -= kept.size
        freed.append(kept.handle)

    def _trim(self, node: Node, freed: list[Any]) -> None:
        if (end := node.available()) < node.end:
            self._truncate(node, end, freed)

    def _truncate(self, node: Node, to: int, freed: list[Any]) -> None:
        """Forget a node's ids from position `to` on, and all below it."""
        following = node.id_at(to)
        for each in below(node):
            self._clear(each, each.start, freed)
            self._leaves.pop(each, None)
        node.children.clear()
        self._clear(node, to, freed)
        self._leaves[node] = None
        place = node
        if to == node.start:
            assert node.parent is not None
            place = node.parent
            del self._leaves[node], place.children[following]
            if place.parent is not None and not place.children:
                self._leaves[place] = None
        self._haunt(place, to, following)

    def _clear(self, node: Node, to: int, freed: list[Any]) -> None:
        while node.segments and node.packed > to:
            self._pop_segment(node, freed)
        for position in [p for p in node.checkpoints if p > to]:
            self._forget(node, position, freed)
        node.ghosts = {ghost: None for ghost in node.ghosts if ghost[0] <= to}
        self.tokens -= node.end - to
        del node.ids[(to - node.start) * WIDTH :]

    def _haunt(self, node: Node, position: int, following: bytes) -> None:
        node.ghosts[position, following] = None
        if len(node.ghosts) > GHOSTS:
            del node.ghosts[next(iter(node.ghosts))]
