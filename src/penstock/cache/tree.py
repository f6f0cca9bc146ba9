"""The prefix tree: which ids have K/V and states, where they are, and which go first. Handles are opaque.

Owns the caches' directory, one root per namespace; refuses to compare anything but whole ids. What it no
longer needs comes back as a list of handles to free. A node's K/V is in segments, or borrowed from a live
row, or in a dead row's adopted buffers until those are packed:

    lend ──▶ extend … (the row grows) ──▶ adopt ──▶ pack … ──▶ segments
                                    └──▶ drop (the row failed)  └──▶ reclaim (it goes on in its own buffers)

Invariant: each id is stored once and has K/V, as have all above it; totals are sums; no pin is broken.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from penstock.cache.checkpoints import Kept, surplus
from penstock.cache.nodes import WIDTH, Checkpoint, Cover, Node, Pin, Segment, below, common, enter, walk
from penstock.cache.value import is_read, likelihood, worth

SEGMENT = 512
"""Ids of a segment at most."""
GHOSTS = 256
"""Evictions that a node remembers, so that a miss can say so."""


class TreeError(RuntimeError):
    """A call that would break the tree's invariant: a bug of the caller."""


@dataclass(frozen=True, slots=True)
class Match:
    """How much of some ids is there. Valid until the tree changes; pinned, until it is unpinned.

    `length`: ids in common that have K/V; `usable`: of them, what a row can start from; `why` it is not
    more, for the operator: 'whole', 'diverged at token n', 'no checkpoint', 'evicted', 'other namespace'.
    """

    node: Node
    length: int
    usable: int
    checkpoint: Checkpoint | None
    why: str


@dataclass(frozen=True, slots=True)
class Cut:
    """A segment that the caller must copy as two, of `at` ids and of the rest, before a split can be there."""

    node: Node
    segment: Segment
    at: int


Piece = tuple[Any, int, int]
"""K/V to copy: (handle, first id in it, how many). A row's first id is its position."""
Stored = tuple[Any, int, int]
"""A segment to keep: (handle, ids, bytes)."""


class Tree:
    """Prefixes of one model. `now` is the number of requests served so far: the only time the tree knows."""

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

    def _root(self, namespace: str) -> Node:
        return self._roots.setdefault(namespace, Node(None, 0, bytearray(), 0))

    # What is there

    def match(self, namespace: str, ids: array[int]) -> Match:
        """The longest prefix of `ids` that is there, and what a row can use of it. Counts as no hit."""
        data = ids.tobytes()
        root = self._roots.get(namespace) or Node(None, 0, bytearray(), 0)
        node, length = walk(root, data)
        found = None
        if self.stateful:
            found = next((c for n in _up(node) if (c := n.deepest(length)) is not None), None)
        usable = (found.position if found else 0) if self.stateful else length
        return Match(node, length, usable, found, self._why(root, node, data, length, usable))

    def _why(self, root: Node, node: Node, data: bytes, length: int, usable: int) -> str:
        if usable < length:
            lost = any(not nxt and usable < at <= length for n in _up(node) for at, nxt in n.ghosts)
            return "evicted" if lost else "no checkpoint"
        following = data[length * WIDTH : (length + 1) * WIDTH]
        if not following:
            return "whole"
        if (length, following) in node.ghosts:
            return "evicted"
        least = min(len(data) // WIDTH, length + SEGMENT)
        if any(walk(other, data)[1] >= least for other in self._roots.values() if other is not root):
            return "other namespace"
        return f"diverged at token {length}"

    def pieces(self, match: Match) -> list[Piece]:
        """Where the K/V of a match's usable ids is, in order, to be copied into a row."""
        found: list[Piece] = []
        for node in reversed(list(_up(match.node))):
            end, at = min(node.end, match.usable), node.start
            for segment in node.segments:
                if at >= end:
                    break
                found.append((segment.handle, 0, min(segment.end, end) - at))
                at = segment.end
            if at < end:
                cover = max(node.covers, key=lambda held: (held.length >= end, not held.live))
                found.append((cover.handle, at, end - at))
        return found

    def pin(self, match: Match, now: float) -> Pin:
        """Take a hit: count it, and let nothing that it reads go until `unpin`."""
        node = match.node
        for above in _up(node):
            above.hits += 1
            above.used = now
        if match.checkpoint is not None:
            match.checkpoint.hits += 1
            match.checkpoint.used = now
        while node.parent is not None and node.start >= match.usable:
            node = node.parent
        pin = Pin(node, match.usable, match.checkpoint)
        for above in pin.path():
            above.pins.append(pin)
        self._pins[pin] = None
        return pin

    def unpin(self, pin: Pin, now: float) -> list[Any]:
        """The hit has been read. Frees what the caps could not take before."""
        if pin not in self._pins:
            raise TreeError("a pin that is not held")
        del self._pins[pin]
        for node in pin.path():
            node.pins.remove(pin)
        return self._within_caps(now, [])

    # Rows

    def lend(self, namespace: str, handle: Any) -> Cover:
        """A row lives, and what `extend` says it has computed can be read from it between steps."""
        cover = Cover(self._root(namespace), handle=handle)
        self._covers[cover] = None
        return cover

    def extend(self, cover: Cover, ids: array[int], now: float) -> Cut | None:
        """The row holds K/V of `ids` after its `length` first. If a segment must be cut, as far as there.

        Then `cut` it, and call again with what is left. Constant time for a row that is alone at its end.
        """
        if not cover.live:
            raise TreeError("an adopted row does not grow")
        data, at = ids.tobytes(), 0
        while at < len(data):
            node = cover.node
            if cover.length < node.end:
                taken = common(data, at, node.ids, (cover.length - node.start) * WIDTH)
                if taken == 0:
                    if (segment := node.inside(cover.length)) is not None:
                        return Cut(node, segment, cover.length - segment.start)
                    node.split(cover.length)
            elif (child := node.children.get(data[at : at + WIDTH])) is not None:
                taken = enter(data, at, child)
                cover.node = child
                child.covers.append(cover)
            else:
                taken = self._append(cover, data[at:], now)
            cover.length += taken
            cover.node.used = now
            at += taken * WIDTH
        return None

    def _append(self, cover: Cover, data: bytes, now: float) -> int:
        node = cover.node
        if node.parent is not None and not node.children:
            node.ids += data
        else:
            child = Node(node, node.end, bytearray(data), now)
            node.children[data[:WIDTH]] = child
            node.branches += 1
            child.covers.append(cover)
            cover.node = child
            self._leaves.pop(node, None)
            self._leaves[child] = None
        self.tokens += len(data) // WIDTH
        return len(data) // WIDTH

    def adopt(self, cover: Cover, handle: Any, size: int, now: float) -> list[Any]:
        """The row has ended or is preempted: its buffers, `size` bytes by capacity, are the tree's now."""
        if not cover.live:
            raise TreeError("a row that was adopted before")
        cover.live, cover.handle, cover.size = False, handle, size
        self.bytes += size
        for node in cover.path():
            node.used = now
        freed: list[Any] = []
        if not self.unpacked(cover):
            self._remove(cover, freed)
        return self._within_caps(now, freed)

    def reclaim(self, cover: Cover, handle: Any) -> None:
        """A row goes on in the buffers that were adopted from it: they are lent again."""
        if cover.live or cover not in self._covers:
            raise TreeError("nothing to reclaim")
        self.bytes -= cover.size
        cover.live, cover.handle, cover.size = True, handle, 0

    def shorten(self, cover: Cover, length: int) -> list[Any]:
        """The row has forgotten what it held from `length` on; what nobody else holds goes."""
        self._refuse_if_read(cover, length)
        freed: list[Any] = []
        left: list[Node] = []
        while cover.node.parent is not None and cover.node.start >= length:
            cover.node.covers.remove(cover)
            left.append(cover.node)
            cover.node = cover.node.parent
        cover.length = min(cover.length, length)
        for node in (*left, cover.node):
            self._trim(node, freed)
        return freed

    def drop(self, cover: Cover, now: float) -> list[Any]:
        """The row's buffers are gone. Raises TreeError if a pin needs them: adopt them instead."""
        self._refuse_if_read(cover, 0)
        freed: list[Any] = []
        self._remove(cover, freed)
        return self._within_caps(now, freed)

    def _refuse_if_read(self, cover: Cover, length: int) -> None:
        if cover not in self._covers:
            raise TreeError("a row that is not lent")
        if any(node.pinned > max(length, node.available(without=cover)) for node in cover.path()):
            raise TreeError("a row that is being read")

    # What is kept

    def unpacked(self, cover: Cover) -> list[tuple[int, int]]:
        """(start, ids) of a row's runs that no segment holds, each at most a segment, in order."""
        found: list[tuple[int, int]] = []
        for node in reversed(list(cover.path())):
            end = min(node.end, cover.length)
            found += [(at, min(SEGMENT, end - at)) for at in range(node.packed, end, SEGMENT)]
        return found

    def pack(self, cover: Cover, stored: Sequence[Stored], now: float) -> list[Any]:
        """Keep copies of the row's first runs that `unpacked` names. An adopted row all packed is freed.

        Raises TreeError where a segment is longer than 512 ids or its node; those before it are kept.
        """
        freed: list[Any] = []
        self._pack(cover, stored)
        if not cover.live and not self.unpacked(cover):
            self._remove(cover, freed)
        return self._within_caps(now, freed)

    def _pack(self, cover: Cover, stored: Sequence[Stored]) -> None:
        path = reversed(list(cover.path()))
        node = next(path, None)
        for handle, count, size in stored:
            while node is not None and node.packed >= min(node.end, cover.length):
                node = next(path, None)
            if node is None or not 0 < count <= min(
                SEGMENT, node.end - node.packed, cover.length - node.packed
            ):
                raise TreeError(f"no run of {count} ids is next")
            node.segments.append(Segment(handle, node.packed, node.packed + count, size))
            self.bytes += size

    def insert(
        self, namespace: str, ids: array[int], stored: Sequence[Stored], now: float
    ) -> Cut | list[Any]:
        """Keep segments of the last ids of `ids`; the first must be in segments. If a Cut, do that first.

        Segments of ids that have one already come back at once. Raises TreeError for a gap or an overlap.
        """
        node, length = walk(self._root(namespace), ids.tobytes())
        if length < len(ids) and (segment := node.inside(length)) is not None:
            return Cut(node, segment, length - segment.start)
        at = len(ids) - sum(count for _, count, _ in stored)
        new, freed = list(stored), []
        cover = self.lend(namespace, None)
        self.extend(cover, ids, now)
        missing = self.unpacked(cover)
        start = missing[0][0] if missing else len(ids)
        while new and at < start:
            at += new[0][1]
            freed.append(new.pop(0)[0])
        try:
            if at != start:
                raise TreeError(f"segments from {at} on, where {start} is next")
            self._pack(cover, new)
        finally:
            self._remove(cover, freed)
        return self._within_caps(now, freed)

    def cut(self, cut: Cut, first: tuple[Any, int], rest: tuple[Any, int], now: float) -> list[Any]:
        """The caller has copied a segment as two (handle, bytes); the old handle comes back."""
        node, old = cut.node, cut.segment
        if old not in node.segments or not old.start < old.start + cut.at < old.end:
            raise TreeError("a segment that is gone")
        index, middle = node.segments.index(old), old.start + cut.at
        node.segments[index : index + 1] = [
            Segment(first[0], old.start, middle, first[1]),
            Segment(rest[0], middle, old.end, rest[1]),
        ]
        self.bytes += first[1] + rest[1] - old.size
        return self._within_caps(now, [old.handle])

    def keep(
        self, cover: Cover, position: int, handle: Any, size: int, now: float, anchor: bool = False
    ) -> list[Any]:
        """Keep the state after `position` ids of a row. One that is there already stays, and this comes back.

        `anchor`: where a later turn is expected to leave the path. Thins the states of the path.
        """
        if not 0 < position <= cover.length:
            raise TreeError(f"a checkpoint at {position} of a row of {cover.length}")
        node = next(node for node in cover.path() if node.start < position)
        if (there := node.checkpoints.get(position)) is not None:
            there.used, there.anchor = now, there.anchor or anchor
            return [handle]
        node.checkpoints[position] = Checkpoint(handle, position, size, now, anchor)
        self.bytes += size
        freed: list[Any] = []
        self._thin(cover, freed)
        return self._within_caps(now, freed)

    def _thin(self, cover: Cover, freed: list[Any]) -> None:
        found: dict[int, tuple[Node, Kept]] = {}
        for node in cover.path():
            fork = node.deepest(node.end) if len(node.children) > 1 else None
            for position, kept in node.checkpoints.items():
                read = any(pin.checkpoint is kept for pin in node.pins)
                spared = kept is fork or kept.hits > 1 or read or position > cover.length
                found[position] = node, Kept(position, spared, kept.anchor)
        for position in surplus([kept for _, kept in found.values()], self.state_tokens):
            self._forget(found[position][0], position, freed)

    # What goes

    def evict(self, size: int, now: float) -> list[Any]:
        """Free `size` bytes, or all that may go: what is held twice first, then by worth."""
        freed: list[Any] = []
        self._evict(max(0, self.bytes - size), now, freed)
        return freed

    @property
    def evictable(self) -> int:
        """Bytes that `evict` could free now: all but what pins need."""
        kept = 0
        covers: set[Cover] = set()
        for node in {node for pin in self._pins for node in pin.path()}:
            kept += sum(s.size for s in node.segments if s.start < node.pinned)
            covers.update(cover for cover in node.covers if is_read(cover))
        kept += sum(
            {id(pin.checkpoint): pin.checkpoint.size for pin in self._pins if pin.checkpoint}.values()
        )
        return self.bytes - kept - sum(cover.size for cover in covers)

    def shed(self, cover: Cover) -> list[Any]:
        """Free the segments whose ids a live row holds as well: nothing is lost while it lives."""
        freed: list[Any] = []
        if cover.live:
            self._shed(cover, 0, freed)
        return freed

    def _shed(self, cover: Cover, goal: int, freed: list[Any]) -> None:
        for lowest in list(cover.path()):
            node = lowest
            ends = [segment.end for segment in node.segments]
            if cover.length < node.packed and (index := bisect_right(ends, cover.length)) > 0:
                node = node.split(ends[index - 1])
            while self.bytes > goal and node.segments and cover.length >= node.packed:
                if node.segments[-1].start < node.pinned:
                    break
                self._pop_segment(node, freed)

    def _evict(self, goal: int, now: float, freed: list[Any]) -> None:
        bytes_before = self.bytes
        for cover in list(self._covers):
            if self.bytes > goal and not cover.live and not self._needed(cover):
                self._remove(cover, freed)
        for cover in list(self._covers):
            if self.bytes > goal:
                self._shed(cover, goal, freed)
        heap: list[tuple[float, int, Node, Checkpoint | Cover | None]] = []
        if self.bytes > goal:
            heap = list(self._candidates(now))
            heapify(heap)
        count = len(heap)
        while self.bytes > goal and heap:
            score, _, node, what = heappop(heap)
            current = self._worth(node, what, now)
            if current is None:
                continue
            changed: Iterable[tuple[Node, Checkpoint | Cover | None]] = [(node, what)]
            if current <= score:
                changed = self._take(node, what, freed)
            for again in changed:
                if (value := self._worth(*again, now)) is not None:
                    heappush(heap, (value, count, *again))
                    count += 1
        self.evicted_bytes += bytes_before - self.bytes

    def _candidates(self, now: float) -> Iterator[tuple[float, int, Node, Checkpoint | Cover | None]]:
        targets: list[tuple[Node, Checkpoint | Cover | None]] = [(leaf, None) for leaf in self._leaves]
        targets += [(cover.node, cover) for cover in self._covers]
        if self.stateful:
            nodes = [node for root in self._roots.values() for node in below(root)]
            targets += [(node, kept) for node in nodes for kept in node.checkpoints.values()]
        for number, target in enumerate(targets):
            if (score := self._worth(*target, now)) is not None:
                yield score, number, *target

    def _worth(self, node: Node, what: Checkpoint | Cover | None, now: float) -> float | None:
        if what is None:
            gone = node not in self._leaves
        elif isinstance(what, Cover):
            gone = what.live or what not in self._covers
        else:
            gone = node.checkpoints.get(what.position) is not what
        return None if gone else worth(node, what, self.stateful, now)

    def _take(
        self, node: Node, what: Checkpoint | Cover | None, freed: list[Any]
    ) -> list[tuple[Node, Checkpoint | Cover | None]]:
        """Evict one candidate; returns what may have become one by that."""
        touched = [node] if node.parent is None else [node, node.parent]
        if what is None:
            self._pop_segment(node, freed)
            self._trim(node, freed)
        elif isinstance(what, Cover):
            touched = [*what.path()]
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
        if self.max_entries is not None and self.entries > self.max_entries:
            bytes_before = self.bytes
            while self.entries > self.max_entries and (leaf := self._least(now)) is not None:
                self._drop_leaf(leaf, freed)
            self.evicted_bytes += bytes_before - self.bytes
        return freed

    def _least(self, now: float) -> Node | None:
        free = [n for n in self._leaves if n.pinned == n.start and not any(c.live for c in n.covers)]
        return min(free, key=lambda n: likelihood(n.hits, now - n.used, n.branches), default=None)

    def _drop_leaf(self, leaf: Node, freed: list[Any]) -> None:
        parent = leaf.parent
        assert parent is not None
        covers, leaf.covers = leaf.covers, []
        for cover in covers:
            cover.node, cover.length = parent, leaf.start
        self._truncate(leaf, leaf.start, freed)
        for cover in covers:
            if not self._needed(cover):
                self._remove(cover, freed)

    def _remove(self, cover: Cover, freed: list[Any]) -> None:
        path = list(cover.path())
        for node in path:
            node.covers.remove(cover)
        for node in path:
            self._trim(node, freed)
        del self._covers[cover]
        self.bytes -= cover.size
        if not cover.live:
            freed.append(cover.handle)

    def _pop_segment(self, node: Node, freed: list[Any]) -> None:
        segment = node.segments.pop()
        self.bytes -= segment.size
        freed.append(segment.handle)

    def _forget(self, node: Node, position: int, freed: list[Any]) -> None:
        kept = node.checkpoints.pop(position)
        self.bytes -= kept.size
        freed.append(kept.handle)

    def _trim(self, node: Node, freed: list[Any]) -> None:
        if node.parent is not None and (end := node.available()) < node.end:
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
            del self._leaves[node]
            place = node.parent
            del place.children[following]
            if place.parent is not None and not place.children:
                self._leaves[place] = None
        self._haunt(place, to, following)

    def _clear(self, node: Node, to: int, freed: list[Any]) -> None:
        while node.segments and node.packed > to:
            self._pop_segment(node, freed)
        for position in [p for p in node.checkpoints if p > to]:
            self._forget(node, position, freed)
        node.ghosts = {place: None for place in node.ghosts if place[0] <= to}
        self.tokens -= node.end - to
        del node.ids[(to - node.start) * WIDTH :]

    def _haunt(self, node: Node, position: int, following: bytes) -> None:
        node.ghosts[position, following] = None
        if len(node.ghosts) > GHOSTS:
            del node.ghosts[next(iter(node.ghosts))]


def _up(node: Node) -> Iterator[Node]:
    """A node and all above it, without the root."""
    while node.parent is not None:
        yield node
        node = node.parent
