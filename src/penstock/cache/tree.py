"""The prefix tree: which ids have K/V and states, where they are, and which go first. Handles are opaque.

Owns the cache's directory, one root per namespace; refuses to compare anything but whole ids. What it no
longer needs comes back as a list of handles to free. A node's K/V is in segments, or borrowed from a live
row, or in a dead row's adopted buffers until those are packed:

    lend ──▶ extend … (the row grows) ──▶ adopt ──▶ pack … ──▶ segments
                                    └──▶ drop

Invariant: each id is stored once and has K/V, as have all above it; totals are sums; no pin is broken.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.cache.checkpoints import surplus
from penstock.cache.holdings import Holdings, total
from penstock.cache.nodes import WIDTH, Checkpoint, Cover, Node, Pin, Segment, common, enter, up, walk
from penstock.cache.value import is_read
from penstock.memory.costs import SEGMENT

SPARE = 1 / 10
"""Of all ids, those that a live row may hold beside segments: they need no copy when it ends. What is nearest
to the root stays, which others share, and it is the first to go when bytes are short."""
BEYOND = 1 / 4
"""Of a prefix that is taken over with its buffers: how much behind it may be lost with them."""
Piece = tuple[Any, int, int]
"""K/V to copy: (handle, first id in it, how many). A row's first id is its position."""
Stored = tuple[Any, int, int]
"""A segment to keep: (handle, ids, bytes)."""


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
    """A segment to be copied as two, of `at` ids and of the rest, before the tree can split there."""

    node: Node
    segment: Segment
    at: int


class Tree(Holdings):
    """Prefixes of one model. `now` is the number of requests served so far: the only time the tree knows."""

    # What is there

    def match(self, namespace: str, ids: array[int]) -> Match:
        """The longest prefix of `ids` that is there, and what a row can use of it. Counts as no hit."""
        root, node, length, usable, found = self._find(namespace, ids)
        why = self._why(root, node, memoryview(ids).cast("B"), length, usable)
        return Match(node, length, usable, found, why)

    def want(self, namespace: str, ids: array[int], now: float) -> int:
        """Somebody waits for the prefix of `ids`, so it is no older than `now`: how much can be used."""
        _, node, _, usable, found = self._find(namespace, ids)
        for above in up(node):
            above.used = now
        if found is not None:
            found.used = now
        return usable

    def _find(self, namespace: str, ids: array[int]) -> tuple[Node, Node, int, int, Checkpoint | None]:
        """The root, where the walk ended, how much is in common, what of it can be used, and from where."""
        root = self._roots.get(namespace) or Node(None, 0, bytearray())
        node, length = walk(root, memoryview(ids).cast("B"))
        if not self.stateful:
            return root, node, length, length, None
        found = next((kept for n in up(node) if (kept := n.deepest(length)) is not None), None)
        return root, node, length, found.position if found else 0, found

    def _why(self, root: Node, node: Node, data: memoryview, length: int, usable: int) -> str:
        if usable < length:
            lost = any(not after and usable < at <= length for n in up(node) for at, after in n.ghosts)
            return "evicted" if lost else "no checkpoint"
        following = bytes(data[length * WIDTH : (length + 1) * WIDTH])
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
        for node in reversed(list(up(match.node))):
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
        for node in up(match.node):
            node.hits, node.used = node.hits + 1, now
        if (kept := match.checkpoint) is not None:
            kept.hits, kept.used = kept.hits + 1, now
        return self.hold(match)

    def hold(self, match: Match) -> Pin:
        """Let nothing that a match reads go until `unpin`; no hit yet."""
        pin = Pin(match.node.above(match.usable), match.usable, match.checkpoint)
        self._pins[pin] = None
        for node in pin.path():
            node.pins.append(pin)
        return pin

    def unpin(self, pin: Pin, now: float) -> list[Any]:
        """The hit has been read. Frees what the caps could not take before."""
        if pin not in self._pins:
            raise TreeError("a pin that is not held")
        del self._pins[pin]
        for node in pin.path():
            node.pins.remove(pin)
        return self._within_caps(now, [])

    def reusable(self, match: Match) -> int:
        """Bytes that `give` frees for a row that starts from a match."""
        packed = sum(s.size for node in up(match.node) for s in node.segments if s.end <= match.usable)
        return packed + total(self._spent(match.node.above(match.usable), match.usable))

    # Rows

    def lend(self, namespace: str, handle: Any) -> Cover:
        """A row lives, and what `extend` says it has computed can be read from it between steps."""
        cover = Cover(self._roots.setdefault(namespace, Node(None, 0, bytearray())), handle=handle)
        self._covers[cover] = None
        return cover

    def extend(self, cover: Cover, ids: array[int], now: float) -> Cut | None:
        """The row holds K/V of `ids` after its `length` first. If a segment must be cut, as far as there.

        Then `cut` it, and call again with what is left. Constant time for a row that is alone at its end.
        """
        if not cover.live:
            raise TreeError("an adopted row does not grow")
        data, at = memoryview(ids).cast("B"), 0
        while at < len(data):
            node = cover.node
            if cover.length < node.end:
                taken = common(data, at, node.ids, (cover.length - node.start) * WIDTH)
                if taken == 0:
                    if (segment := node.inside(cover.length)) is not None:
                        return Cut(node, segment, cover.length - segment.start)
                    node.split(cover.length)
            elif (child := node.children.get(bytes(data[at : at + WIDTH]))) is not None:
                taken = enter(data, at, child)
                cover.node = child
                child.covers.append(cover)
            else:
                taken = self._append(cover, data[at:])
            cover.length += taken
            cover.node.used = now
            at += taken * WIDTH
        return None

    def _append(self, cover: Cover, data: memoryview) -> int:
        node = cover.node
        if node.parent is not None and not node.children:
            node.ids += data
        else:
            child = Node(node, node.end, bytearray(data), covers=[cover])
            node.children[bytes(data[:WIDTH])] = child
            node.branches += 1
            cover.node = child
            self._leaves[child] = None
        self.tokens += len(data) // WIDTH
        return len(data) // WIDTH

    def give(self, cover: Cover) -> list[Any]:
        """A live row is about to get all that its path holds; the tree keeps none of it, and borrows it.

        Rows that were adopted go too if they hold little beyond; that is lost.
        """
        freed: list[Any] = []
        for other in self._spent(cover.node, cover.length):
            self._remove(other, freed)
        self._shed(cover, 0, freed)
        return freed

    def _spent(self, node: Node, length: int) -> list[Cover]:
        """Adopted rows that hold a path or a part of it, and at most `BEYOND` of its length more."""
        path = dict.fromkeys(up(node))
        held = dict.fromkeys(c for n in path for c in n.covers if c.node in path or n is node)
        return [c for c in held if not c.live and c.length <= length * (1 + BEYOND) and not is_read(c)]

    def adopt(self, cover: Cover, handle: Any, size: int, now: float) -> list[Any]:
        """The row has ended or is preempted: its buffers, `size` bytes by capacity, are the tree's now."""
        if not cover.live:
            raise TreeError("a row that was adopted before")
        cover.live, cover.handle, cover.size = False, handle, size
        self.bytes += size
        for node in cover.path():
            node.used = now
        return self.pack(cover, (), now)

    def drop(self, cover: Cover, now: float, stored: Sequence[Stored] = ()) -> list[Any]:
        """The row's buffers go, but for copies of its first runs that `unpacked` names.

        Raises TreeError, having kept the copies, if a pin needs the rest: adopt the row instead.
        """
        freed: list[Any] = []
        self._pack(cover, stored)
        if cover not in self._covers:
            raise TreeError("a row that is not lent")
        if any(node.pinned > node.available(without=cover) for node in cover.path()):
            raise TreeError("a row that is being read")
        self._remove(cover, freed)
        return self._within_caps(now, freed)

    # What is kept

    def shed(self, cover: Cover, now: float) -> list[Any]:
        """A live row has copied what it found: let go of that, from its end, but for a little that may stay.

        From now on it is borrowed from the row. Buffers that were adopted go when all they hold is borrowed.
        """
        freed: list[Any] = []
        ids, size = self._held_twice()
        surplus = ids - int(self.tokens * SPARE)
        if surplus > 0:
            self._shed(cover, self.bytes - size * surplus // ids, freed)
        for other in [other for other in self._covers if not other.live and not is_read(other)]:
            if not self.unpacked(other):
                self._remove(other, freed)
        return self._within_caps(now, freed)

    def _held_twice(self) -> tuple[int, int]:
        """Ids and bytes of the segments that a live row has copied."""
        reach: dict[Node, int] = {}
        for cover in self._covers:
            for node in cover.path() if cover.live else ():
                reach[node] = max(reach.get(node, 0), cover.length)
        twice = [s for node, length in reach.items() for s in node.segments if s.end <= length]
        return sum(s.end - s.start for s in twice), sum(s.size for s in twice)

    def unpacked(self, cover: Cover) -> list[tuple[int, int]]:
        """(start, ids) of a row's runs that nobody else holds, each at most a segment, in order."""
        return [
            (at, min(SEGMENT, end - at))
            for _, start, end in self._alone(cover)
            for at in range(start, end, SEGMENT)
        ]

    def _alone(self, cover: Cover) -> Iterator[tuple[Node, int, int]]:
        """Where nobody else holds what the row does, as nodes' rests, split off where segments can begin."""
        for node in reversed(list(cover.path())):
            start, end = node.available(without=cover), min(node.end, cover.length)
            if start < end:
                if node.packed < start:
                    node.split(start)
                yield node, start, end

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
        runs = self._alone(cover)
        node, at, end = None, 0, 0
        for handle, ids, size in stored:
            if at == end:
                node, at, end = next(runs, (None, 0, 0))
            if node is None or not 0 < ids <= min(SEGMENT, end - at):
                raise TreeError(f"no run of {ids} ids is next")
            node.segments.append(Segment(handle, at, at + ids, size))
            at += ids
            self.bytes += size

    def cut(self, cut: Cut, first: tuple[Any, int], rest: tuple[Any, int], now: float) -> list[Any]:
        """The caller has copied a segment as two (handle, bytes); the old handle comes back."""
        node, old = cut.node, cut.segment
        if old not in node.segments:
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

        `anchor`: where others are expected to leave the path: after system and tools, at a turn's start.
        Thins the states of the path.
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
        places = {p: node for node in cover.path() for p in node.checkpoints if p <= cover.length}
        path = [node.checkpoints[p] for p, node in places.items()]
        read = [pin.checkpoint for pin in self._pins]
        forks = [node.deepest(node.end) for node in cover.path() if len(node.children) > 1]
        spared = {kept.position for kept in path if kept.hits > 1 or kept in read or kept in forks}
        for position in surplus(path, spared, self.state_tokens):
            self._forget(places[position], position, freed)
