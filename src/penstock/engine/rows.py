"""One sequence's caches: what it alone owns of the device's memory, layer by layer.

Owns `Row` (the caches of all layers, and how many positions they hold), `RowKV` (keys and values of one
layer in a buffer that is allocated once and written in place) and `StateStack` (recurrent states of the rows
that decode together). Windowed layers keep a RotatingKVCache of mlx-lm's kind, one per row.
Refuses to share a buffer between rows: K/V are written in place, so a second owner would see it or force a
copy. Invariant: a row's recurrent arrays are either in the row or in the stack, never in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import addressof, c_char
from math import lcm
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, create_attention_mask

from penstock.engine import device, pace
from penstock.memory.costs import grown


class RowKV:
    """One row's keys and values of one layer, with the attributes of mlx-lm's KVCache.

    Both buffers are (1, heads, n, width), allocated at the first write with room for what is reserved by
    then; widths differ in MLA layers (latent, rope). Positions from `offset` on hold nothing that counts.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0
        self._reserved = capacity

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        if self.keys is None or self.values is None:
            return self._reserved
        return int(min(self.keys.shape[2], self.values.shape[2]))

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions; what is there moves to larger buffers (lazily)."""
        self._reserved = max(self._reserved, capacity)
        if self.keys is not None and self.values is not None and capacity > self.capacity:
            self.keys = _enlarged(self.keys, self.offset, capacity)
            self.values = _enlarged(self.values, self.offset, capacity)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (1, heads, n, width) and return all keys and values up to the new offset, as views."""
        start, end = self.offset, self.offset + keys.shape[2]
        if end > self.capacity:
            self.reserve(grown(end))
        if self.keys is None:
            self.keys, self.values = (roomy(x, self._reserved) for x in (keys, values))
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values  # type: ignore[index]
        self.offset = end
        pace.mark(self.keys)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Views of what counts. Held across a step they would turn the next write into a copy."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of the next `n` positions, as KVCache makes it."""
        return create_attention_mask(n, self.offset, return_array, window_size)

    def size(self) -> int:
        return self.offset

    @property
    def state(self) -> tuple[mx.array | None, mx.array | None, int]:
        return self.keys, self.values, self.offset


class RowWindow(RotatingKVCache):  # type: ignore[misc]
    """One row's windowed layer: mlx-lm's cache, which tells `pace` when it was written."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        fetched = super().update_and_fetch(keys, values)
        pace.mark(fetched[0])
        return fetched


class RowState(ArraysCache):  # type: ignore[misc]
    """One row's recurrent state of one layer: mlx-lm's cache, which tells `pace` when it was written."""

    def __setitem__(self, entry: int, value: Any) -> None:
        super().__setitem__(entry, value)
        if entry == len(self.cache) - 1 and pace.is_on():
            # Models store slices of a whole chunk: it need not stay until the last layer is done.
            self.unpin()
            pace.mark(*_arrays(self))

    def unpin(self) -> None:
        """Let it own its bytes and no more."""
        self.cache: list[Any] = [None if array is None else mx.contiguous(array) for array in self.cache]


def roomy(like: mx.array, capacity: int) -> mx.array:
    """Zeros (1, heads, n, width) with the heads, width and dtype of `like`; n ≥ capacity, in whole pages.

    The allocator may take a freed buffer that is a page larger than the pages asked for. Where a buffer has
    more than one page that its array has not, MLX writes to a copy of it (`is_donatable`), each time.
    """
    _, heads, _, width = like.shape
    position = heads * width * like.dtype.size
    step = lcm(device.page(), position) // position
    return mx.zeros((1, heads, -(-capacity // step) * step, width), like.dtype)


def _enlarged(buffer: mx.array, used: int, capacity: int) -> mx.array:
    larger = roomy(buffer, capacity)
    larger[..., :used, :] = buffer[..., :used, :]
    return larger


def _shrink(window: Any) -> None:
    surplus = window.keys.shape[2] - window.max_size
    keys, values = window.keys, window.values
    if surplus > 0:
        keys, values = window._trim(surplus, keys), window._trim(surplus, values)
        window._idx = window.max_size
    window.keys, window.values = mx.contiguous(keys), mx.contiguous(values)


Leaf = Any
"""A cache that isn't a list of caches: RowKV, RotatingKVCache, ArraysCache, or a class we don't know."""


def owned(cache: Any, capacity: int) -> Any:
    """mlx-lm's fresh cache of one layer as the row keeps it: in our classes, but for those unknown to us."""
    if type(cache) is KVCache:
        return RowKV(capacity)
    if type(cache) is ArraysCache:
        return RowState(len(cache.cache))
    if type(cache) is RotatingKVCache:
        return RowWindow(cache.max_size, cache.keep)
    if type(cache) is CacheList:
        return CacheList(*(owned(inner, capacity) for inner in cache.caches))
    return cache


def leaves(caches: Iterable[Any]) -> list[Leaf]:
    """The caches of all layers in order, lists of caches opened."""
    found: list[Leaf] = []
    for cache in caches:
        found.extend(leaves(cache.caches) if isinstance(cache, CacheList) else [cache])
    return found


def unknown(caches: Iterable[Any]) -> str | None:
    """The name of a cache class that has no ragged form, if there is one."""
    for leaf in leaves(caches):
        if type(leaf) not in (RowKV, RowWindow, RowState):
            return type(leaf).__name__
    return None


class Row:
    """A sequence's caches, and how many positions they hold. Opaque to everyone but the runner.

    `length` counts launched positions: a decode step counts when it is built, not when it is evaluated.
    """

    def __init__(self, caches: Sequence[Any], capacity: int) -> None:
        self.caches = [owned(cache, capacity) for cache in caches]
        self.leaves = leaves(self.caches)
        self.kv = [leaf for leaf in self.leaves if isinstance(leaf, RowKV)]
        self.states = [leaf for leaf in self.leaves if isinstance(leaf, ArraysCache)]
        self.capacity = capacity
        self.length = 0
        self.is_open = True
        self._settled: list[int] | None = None

    def arrays(self) -> list[mx.array]:
        """Every array the row holds, written or replaced by the model."""
        return [array for leaf in self.leaves for array in _arrays(leaf)]

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` positions; one layer at a time, so that only one exists twice meanwhile."""
        if capacity > self.capacity:
            self.capacity = capacity
            for cache in self.kv:
                cache.reserve(capacity)
                mx.eval(_arrays(cache))
                mx.synchronize()  # what it was copied from may go now
            self.settle()

    def settle(self) -> None:
        """What was done to it is done: raises what MLX held back, and notes where its buffers are."""
        mx.synchronize()
        self._settled = self._places()

    @property
    def is_intact(self) -> bool:
        """After an error: whether its keys and values are where they were settled, as far as they were read.

        Steps write behind that in place. Where MLX copied a buffer for one, the copy may have failed.
        """
        for _ in range(2):  # the first look may run a failed step's write again, and hear of its error
            try:
                return self._settled is not None and self._settled == self._places()
            except RuntimeError:
                continue
        return False

    def _places(self) -> list[int] | None:
        """Addresses of its buffers; None where the host's look would move them.

        Views are looked at, which begin where their buffers do: where MLX raised before a step's end was
        signalled, a look at the buffers would wait for it for ever.
        """
        if mx.default_device() != mx.Device(mx.cpu) and not mx.metal.is_available():
            return None
        buffers = [x for leaf in self.kv for x in (leaf.keys, leaf.values) if x is not None]
        views = [buffer[:1, :1, :1, :1] for buffer in buffers]
        mx.eval(views)
        return [addressof(c_char.from_buffer(memoryview(view))) for view in views]  # type: ignore[arg-type]

    def unpin(self) -> None:
        """Let states and windows own their bytes and no more, lazily: a chunk leaves more of them alive.

        Models store states that are slices of a whole chunk, and a window holds a chunk beyond its size
        until the next position comes.
        """
        for cache in self.states:
            cache.unpin()
        for window in self.leaves:
            if isinstance(window, RotatingKVCache):
                _shrink(window)

    def keep_kv(self) -> None:
        """No longer a row: only its keys and values are left, to be read."""
        self.is_open = False
        self.caches, self.leaves, self.states = [], [], []

    def close(self) -> None:
        """Let go of everything."""
        self.is_open = False
        self.caches, self.leaves, self.kv, self.states = [], [], [], []


def _arrays(leaf: Leaf) -> list[mx.array]:
    held = leaf.cache if isinstance(leaf, ArraysCache) else [value for _, value in tree_flatten(leaf.state)]
    return [value for value in held if isinstance(value, mx.array)]


class StateStack:
    """The recurrent states of the rows that decode together, one ArraysCache of B rows per layer.

    It stays while the same rows decode. When membership changes a new one is made: rows that leave and
    live on get their states back as copies, because a slice would keep the whole stack alive.
    """

    def __init__(self) -> None:
        self.members: tuple[Row, ...] = ()
        self.caches: list[ArraysCache] = []

    def gather(self, rows: Sequence[Row]) -> list[ArraysCache]:
        """The stacked caches of `rows`, in this order: one per recurrent layer, for the model to update."""
        rows = tuple(rows)
        if rows == self.members:
            return self.caches
        self._hand_back([row for row in self.members if row not in rows])
        stacked = []
        for layer, sample in enumerate(rows[0].states):
            cache = ArraysCache(len(sample.cache))
            for entry in range(len(sample.cache)):
                cache[entry] = _stack([self._piece(row, layer, entry) for row in rows])
            stacked.append(cache)
        for row in rows:
            for cache in row.states:
                cache.cache = [None] * len(cache.cache)
        self.members, self.caches = rows, stacked
        return stacked

    def states(self, row: Row) -> list[list[mx.array | None]]:
        """What a row's recurrent layers hold, wherever it is. References, but for copies out of the stack."""
        held = range(len(row.states))
        found = [[self._piece(row, at, entry) for entry in range(len(row.states[at].cache))] for at in held]
        return [[None if x is None else mx.contiguous(x) for x in layer] for layer in found]

    def release(self, rows: Sequence[Row]) -> None:
        """Let these rows hold their states themselves again; if one of them is here, the stack dissolves."""
        if any(row in rows for row in self.members):
            self._hand_back(self.members)
            self.members, self.caches = (), []

    def forget(self, row: Row) -> None:
        """A closed row's share goes with the next change of membership, or now if nobody else is here."""
        if row in self.members and not any(member.is_open for member in self.members):
            self.members, self.caches = (), []

    def arrays(self) -> list[mx.array]:
        return [array for cache in self.caches for array in _arrays(cache)]

    def _piece(self, row: Row, layer: int, entry: int) -> mx.array | None:
        if row not in self.members:
            return row.states[layer][entry]  # type: ignore[no-any-return]
        stacked: mx.array | None = self.caches[layer][entry]
        index = self.members.index(row)
        return None if stacked is None else stacked[index : index + 1]

    def _hand_back(self, rows: Iterable[Row]) -> None:
        copies = []
        for row in rows:
            if row.is_open:
                index = self.members.index(row)
                for cache, stacked in zip(row.states, self.caches, strict=True):
                    cache.cache = [
                        None if x is None else mx.contiguous(x[index : index + 1]) for x in stacked.cache
                    ]
                    copies.extend(_arrays(cache))
        mx.async_eval(copies)  # type: ignore[no-untyped-call]


def _stack(parts: list[mx.array | None]) -> mx.array | None:
    """Rows' states along axis 0; a row that has none yet starts from zeros, as the models do."""
    sample = next((part for part in parts if part is not None), None)
    if sample is None:
        return None
    filled = [mx.zeros((1, *sample.shape[1:]), sample.dtype) if part is None else part for part in parts]
    return mx.concatenate(filled, axis=0)
