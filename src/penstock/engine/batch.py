"""The runner: prefill and decode over the rows' own caches, through mlx-lm's unmodified model code.

Owns every MLX array that a live sequence holds; scheduler, ledger and loop know rows as handles.
Refuses to pad, merge or copy K/V: in a ragged decode step projections and MLPs run over all rows at once,
K/V are written row by row and attended row by row (see `seams`), recurrent states are stacked. Invariant:
one row's result and memory don't depend on the length of another.

        inputs (B,) ──▶ model, batch B ──▶ logits (B, V)
                          │  layer i sees RaggedKV(i): positions of all rows, and
                          ▼
             row 0: RowKV(i)   row 1: RowKV(i)   …      written in place, never moved by company
             rows 0…B-1: one ArraysCache(i) of the stack, kept while the same rows decode
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from penstock.engine import pace, seams
from penstock.engine.rows import Leaf, Row, StateStack, unknown
from penstock.memory.costs import grown


class RaggedKV:
    """One attention layer's caches of all rows, for the length of one decode step.

    It has what model code uses of mlx-lm's caches while it decodes; anything else raises AttributeError.
    """

    def __init__(self, rows: Sequence[Leaf], offsets: mx.array) -> None:
        self.offset = offsets
        """Positions (B,) int32, one array for all layers of the step: some models keep it beyond a layer."""
        self._rows = rows
        self._fetched: tuple[seams.RaggedArray, seams.RaggedArray] | None = None

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[seams.RaggedArray, seams.RaggedArray]:
        """Write (B, H, 1, D) to the rows' caches; all rows' keys and values as ragged arrays of B parts."""
        count = len(self._rows)
        parts = zip(self._rows, seams.split(keys, count), seams.split(values, count), strict=True)
        pairs = [cache.update_and_fetch(k, v) for cache, k, v in parts]
        self._fetched = seams.RaggedArray([k for k, _ in pairs]), seams.RaggedArray([v for _, v in pairs])
        return self._fetched

    def keys_and_values(self) -> tuple[seams.RaggedArray, seams.RaggedArray]:
        """What the last `update_and_fetch` returned, for layers that share another's keys."""
        if self._fetched is None:
            raise AttributeError("no keys were written in this step")
        return self._fetched

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """None where no row needs a mask, else one (or None) per row."""
        masks = [
            cache.make_mask(n, return_array=return_array, window_size=window_size) for cache in self._rows
        ]
        return None if all(mask is None for mask in masks) else seams.RaggedArray(masks)


class Runner:
    """Opens, computes and closes rows. All calls come from the one thread that uses MLX.

    After an exception from `prefill` or `decode` the rows named in that call are undefined: close them.
    """

    def __init__(self, model: Any, mode: str = "ragged", reason: str = "") -> None:
        """`model` as mlx-lm builds it; `mode` "ragged" or "serial" (each row by itself), and why."""
        self._model = model
        self._rows: list[Row] = []
        self._stack = StateStack()
        if mode == "ragged" and (obstacle := seams.install() or self._obstacle()):
            mode, reason = "serial", obstacle
        self.mode = mode
        self.reason = reason

    def open(self, capacity: int) -> Row:
        """An empty row with room for `capacity` positions, allocated when the first are written."""
        row = Row(make_prompt_cache(self._model), capacity)
        self._rows.append(row)
        return row

    def prefill(self, row: Row, ids: Sequence[int]) -> list[mx.array]:
        """Append `ids`, the row's next positions, as one chunk. Returns the arrays whose evaluation ends it.

        Layers are launched one after the other, as `pace` has it. Only the caches are to be evaluated, so the
        last layer's MLP and the head are never computed; drop the arrays when they are.
        """
        with pace.layer_by_layer():
            return self.build(row, ids)

    def build(self, row: Row, ids: Sequence[int]) -> list[mx.array]:
        """The same, but nothing is launched: shapes are known before. Lazy but for a growing row."""
        self._stack.release([row])
        self._make_room(row, len(ids))
        self._model(mx.array([list(ids)], mx.int32), cache=row.caches)
        row.unpin()
        row.length += len(ids)
        return row.arrays()

    def decode(self, rows: Sequence[Row], inputs: mx.array) -> mx.array:
        """One more position for each of `rows`: integer `inputs` (B,), perhaps in flight, to logits (B, V).

        Lazy but for a growing row. Evaluating the logits evaluates all state of the step.
        """
        for row in rows:
            self._make_room(row, 1)
        if self.mode == "ragged" and len(rows) > 1:
            logits, caches = self._ragged(rows, inputs), self._stack.caches
        else:
            self._stack.release(rows)
            parts = zip(rows, seams.split(inputs[:, None], len(rows)), strict=True)
            alone = [self._model(part, cache=row.caches)[:, -1] for row, part in parts]
            logits = alone[0] if len(alone) == 1 else mx.concatenate(alone, axis=0)
            caches = [cache for row in rows for cache in row.states]
        for row in rows:
            row.length += 1
        states = [array for cache in caches for array in cache.cache if array is not None]
        return mx.depends(logits, states) if states else logits

    def reserve(self, row: Row, capacity: int) -> None:
        """Give the row room for `capacity` positions now, layer by layer, evaluated."""
        row.reserve(capacity)

    def states(self, row: Row) -> list[list[mx.array | None]]:
        """The row's recurrent states by layer as they are now, to be kept: nothing writes to them. Lazy."""
        return self._stack.states(row)

    def detach(self, row: Row) -> None:
        """Let go of a row that keeps its keys and values, and nothing else: they belong to the caller."""
        self._rows.remove(row)
        row.keep_kv()
        self._stack.forget(row)

    @property
    def orphans(self) -> int:
        """Closed rows whose states are still in the stack, until the rows that decode are others."""
        return sum(not row.is_open for row in self._stack.members)

    def close(self, row: Row) -> None:
        """Let go of a row's memory; other rows don't notice. Closing twice is harmless."""
        if row.is_open:
            self._rows.remove(row)
            row.close()
            self._stack.forget(row)

    def reset(self) -> None:
        """Close every row."""
        for row in list(self._rows):
            self.close(row)

    def row_bytes(self, row: Row) -> int:
        """Allocated bytes of a row: by capacity and not length, with its share of the stacked states."""
        stacked = self._stack.arrays() if row in self._stack.members else []
        return _allocated(row.arrays()) + _allocated(stacked) // max(1, len(self._stack.members))

    def _obstacle(self) -> str | None:
        name = unknown(Row(make_prompt_cache(self._model), 0).caches)
        return name and f"its {name} has no batched form"

    def _make_room(self, row: Row, more: int) -> None:
        if row.length + more > row.capacity:
            row.reserve(grown(row.length + more))

    def _ragged(self, rows: Sequence[Row], inputs: mx.array) -> mx.array:
        offsets = mx.array([row.length for row in rows], mx.int32)
        states = iter(self._stack.gather(rows))
        layers = zip(*(row.caches for row in rows), strict=True)
        caches = [_layer(per_row, offsets, states) for per_row in layers]
        return self._model(inputs[:, None], cache=caches)[:, -1]  # type: ignore[no-any-return]


def _allocated(arrays: Sequence[mx.array]) -> int:
    """Bytes of the arrays' buffers; waits for what is in flight, which has no buffer yet."""
    mx.eval(arrays)
    return int(mx.get_array_buffer_size(arrays))


def _layer(per_row: Sequence[Any], offsets: mx.array, states: Iterator[ArraysCache]) -> Any:
    """What the model gets as one layer's cache; `states` are taken in the order of `rows.leaves`."""
    kind = per_row[0]
    if isinstance(kind, CacheList):
        inner: Iterable[Any] = zip(*(cache.caches for cache in per_row), strict=True)
        return CacheList(*(_layer(parts, offsets, states) for parts in inner))
    return next(states) if isinstance(kind, ArraysCache) else RaggedKV(per_row, offsets)
