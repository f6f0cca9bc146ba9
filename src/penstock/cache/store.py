"""The prompt cache's arrays: segments of keys and values, snapshots of what cannot be cut, and the way back.

A segment holds a run of ids over all attention layers, packed into one array per (heads, width, dtype), so
that a long prompt costs hundreds of live buffers and not tens of thousands. A snapshot holds recurrent
states and sliding windows at one position; recurrent arrays are replaced and never written, so it only
refers to them. Owns no policy and keeps no list: what it returns belongs to the tree.

Invariant: what is returned is evaluated and owns its bytes: no view of a row's buffer leaves this module, and
no reader of a row is pending when the next step writes to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

from penstock.engine.rows import Row, RowKV, RowState, RowWindow, roomy


@dataclass(slots=True, eq=False)
class Segment:
    """Keys and values of `count` ids: one array (buffers, heads, count, width) per group. `size` in bytes."""

    arrays: list[mx.array]
    order: tuple[tuple[int, int], ...]
    """Where the keys and then the values of each layer are: (group, place in it)."""
    count: int
    size: int


@dataclass(slots=True, eq=False)
class Snapshot:
    """States and windows at `position`. `parts` are per leaf, in the row's order; None for plain KV."""

    position: int
    parts: list[Any]
    size: int
    buffers: int


@dataclass(frozen=True, slots=True)
class Part:
    """`count` ids from `start` of a segment, or of a live row."""

    source: Segment | Row
    start: int
    count: int


@dataclass(slots=True)
class Run:
    """Keys and values of `count` ids, of each layer in turn, (1, heads, count, width).

    `grouped`: they are views of arrays that they share.
    """

    views: list[mx.array]
    count: int
    grouped: bool


def obstacle(row: Row) -> str | None:
    """Why rows of this model cannot be cached: a cache class without an exact rule. None: they can."""
    for leaf in row.leaves:
        plain = type(leaf) in (RowKV, RowState)
        window = type(leaf) is RowWindow and leaf.keep == 0
        if not plain and not window:
            return type(leaf).__name__
    return None


def needs_snapshots(row: Row) -> bool:
    """Whether a hit is possible only where a snapshot is: some layer can't be cut at any id."""
    return len(row.kv) < len(row.leaves)


def pack(row: Row, start: int, count: int) -> Segment:
    """Copy `count` positions of a row from `start` on into a segment of its own."""
    groups: dict[tuple[int, int, mx.Dtype], list[mx.array]] = {}
    order = []
    for buffer in _buffers(row):
        kind = (buffer.shape[1], buffer.shape[3], buffer.dtype)
        members = groups.setdefault(kind, [])
        order.append((list(groups).index(kind), len(members)))
        members.append(buffer[0, :, start : start + count])
    return _segment([mx.stack(members) for members in groups.values()], tuple(order), count)


def move(row: Row, runs: Sequence[tuple[int, int]]) -> list[Segment]:
    """Pack these runs (start, ids) where there is room for a layer only: the row's layers go one by one.

    The segments have as many buffers as the row. After an error the row is not intact.
    """
    moved: list[list[mx.array]] = [[] for _ in runs]
    order = tuple((place, 0) for place in range(2 * len(row.kv)))
    for leaf in row.kv:
        for arrays, (start, count) in zip(moved, runs, strict=True):
            for buffer in (leaf.keys, leaf.values):
                # A sum has a buffer of its own, however small; `contiguous` may keep all of the row's.
                arrays.append(buffer[:, :, start : start + count] + 0)  # type: ignore[index]
        mx.eval(moved)
        mx.synchronize()
        leaf.keys = leaf.values = None
    return [_segment(arrays, order, count) for arrays, (_, count) in zip(moved, runs, strict=True)]


def cut(segment: Segment, at: int) -> tuple[Segment, Segment]:
    """Two segments in place of one, of `at` ids and of the rest; both are copies."""
    first = [mx.contiguous(array[:, :, :at]) for array in segment.arrays]
    rest = [mx.contiguous(array[:, :, at:]) for array in segment.arrays]
    return _segment(first, segment.order, at), _segment(rest, segment.order, segment.count - at)


def run(part: Part) -> Run:
    """A part's keys and values as views; whoever holds them holds the arrays."""
    grouped = isinstance(part.source, Segment) and len(part.source.arrays) < len(part.source.order)
    return Run(_pieces(part), part.count, grouped)


def separate(runs: Iterable[Run]) -> None:
    """Give each layer bytes of its own, run by run, so that `assemble` can let them go one by one."""
    for run in runs:
        if run.grouped:
            run.views = [view + 0 for view in run.views]  # `contiguous` may keep the whole array
            mx.eval(run.views)
            mx.synchronize()


def assemble(row: Row, runs: Sequence[Run]) -> None:
    """Fill an empty row with the keys and values of `runs`, one after the other, with room to its capacity.

    Uses them up, layer by layer, each done before the next: what nobody else holds exists twice for a layer.
    """
    length = sum(run.count for run in runs)
    for leaf in row.kv:
        for which in ("keys", "values"):
            views = [run.views.pop(0) for run in runs]
            setattr(leaf, which, _joined(views, row.capacity))
            del views
        leaf.offset = length
        mx.eval(leaf.keys, leaf.values)
        mx.synchronize()
    row.length = length
    row.settle()


def snapshot(row: Row, position: int, states: Iterable[list[mx.array | None]] | None = None) -> Snapshot:
    """What a row holds at its present position besides plain keys and values, to come back to it later.

    `states`: of its recurrent layers, where the row does not hold them itself.
    """
    recurrent = iter([cache.cache for cache in row.states] if states is None else states)
    parts: list[Any] = []
    arrays: list[mx.array] = []
    for leaf in row.leaves:
        if isinstance(leaf, ArraysCache):
            held = list(next(recurrent))
            parts.append(held)
            arrays += [x for x in held if x is not None]
        elif isinstance(leaf, RotatingKVCache):
            window = _window(leaf)
            parts.append(window)
            arrays += window
        else:
            parts.append(None)
    mx.eval(arrays)
    return Snapshot(position, parts, int(mx.get_array_buffer_size(arrays)), len(arrays))


def restore(row: Row, taken: Snapshot) -> None:
    """Bring an assembled row's states and windows to the snapshot's position."""
    for leaf, part in zip(row.leaves, taken.parts, strict=True):
        if isinstance(leaf, ArraysCache):
            leaf.cache = list(part)
        elif isinstance(leaf, RotatingKVCache):
            leaf.keys, leaf.values = part
            leaf.offset, leaf._idx = taken.position, int(leaf.keys.shape[2])
    row.length = taken.position


def _segment(arrays: list[mx.array], order: tuple[tuple[int, int], ...], count: int) -> Segment:
    mx.eval(arrays)
    mx.synchronize()  # what it was copied from may go now
    return Segment(arrays, order, count, int(mx.get_array_buffer_size(arrays)))


def _buffers(row: Row) -> list[mx.array]:
    """The keys and then the values of each plain layer, each (1, heads, capacity, width)."""
    return [buffer for leaf in row.kv for buffer in (leaf.keys, leaf.values) if buffer is not None]


def _pieces(part: Part) -> list[mx.array]:
    """Views of a part in the row's order, each (1, heads, count, width)."""
    end = part.start + part.count
    if isinstance(part.source, Row):
        return [buffer[:, :, part.start : end] for buffer in _buffers(part.source)]
    source = part.source
    return [source.arrays[group][place : place + 1, :, part.start : end] for group, place in source.order]


def _joined(pieces: list[mx.array], capacity: int) -> mx.array:
    """One buffer with room for `capacity` ids; written in place, so that nothing exists twice."""
    joined, start = roomy(pieces[0], capacity), 0
    for piece in pieces:
        joined[:, :, start : start + piece.shape[2]] = piece  # all axes as slices: twice as fast
        start += piece.shape[2]
    return joined


def _window(cache: RotatingKVCache) -> list[mx.array]:
    """A window's keys and values in order of time, at most its size of them, as copies."""
    held = min(int(cache.offset), int(cache.max_size))
    ordered = [cache._temporal_order(x) for x in (cache.keys, cache.values)]
    return [mx.contiguous(x[:, :, x.shape[2] - held :]) for x in ordered]
