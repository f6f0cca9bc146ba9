"""What changes logits before they are normalised: biases, penalties for repeated ids, forbidden ids.

Owns mlx-lm's logits processors (`mlx_lm.sample_utils.make_logits_processors`) for a whole batch at once, in
its order: bias, repetition, presence, frequency; forbidden ids last, so that no bias brings one back. Each is
a gather and a scatter of the (row, id) pairs it touches: nothing is as wide as the vocabulary but the logits.
The id that a row has just consumed may still be in flight; it joins the pairs on the device, unread.
Invariant: a row's logits depend on its own settings and ids only. Ids outside the vocabulary are ignored.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import mlx.core as mx

from penstock.wire import Sampling

Change = Callable[[mx.array, mx.array], mx.array]


class Penalty:
    """One kind of penalty, for the rows that have it. A context size of 0 is all of it, as in mlx-lm."""

    def __init__(self, rows: Sequence[tuple[int, int, float]], batch: int, kind: str) -> None:
        """`rows`: (row, context size, strength). `kind`: 'repetition', 'presence' or 'frequency'."""
        self._kind, self._sizes = kind, [(row, size) for row, size, _ in rows]
        strengths = [0.0] * batch
        for row, _, strength in rows:
            strengths[row] = strength
        self._strength = mx.array(strengths)
        self._rows = mx.array([row for row, _, _ in rows], dtype=mx.uint32)

    def apply(self, logits: mx.array, history: Sequence[Sequence[int]], inputs: mx.array) -> mx.array:
        """`logits` (B, V) with this penalty; `history[row]` are the ids before `inputs[row]`."""
        rows, ids = self._pairs(history, inputs)
        strength = self._strength[rows]
        if self._kind == "frequency":
            return logits.at[rows, ids].subtract(strength)
        # Pairs that occur twice write the same value twice: once per id, as these two are meant.
        chosen = logits[rows, ids]
        if self._kind == "repetition":
            logits[rows, ids] = mx.where(chosen < 0, chosen * strength, chosen / strength)
        else:
            logits[rows, ids] = chosen - strength
        return logits

    def _pairs(self, history: Sequence[Sequence[int]], inputs: mx.array) -> tuple[mx.array, mx.array]:
        ids, rows = array("I"), array("I")
        for row, size in self._sizes:
            past = history[row]
            tail = past[max(0, len(past) - size + 1) :] if size else past
            ids.extend(tail)
            rows.extend(array("I", (row,)) * len(tail))
        newest = inputs[self._rows].astype(mx.uint32)
        if not ids:
            return self._rows, newest
        return mx.concatenate([_indices(rows), self._rows]), mx.concatenate([_indices(ids), newest])


def _indices(ids: array[int]) -> mx.array:
    # MLX reads the buffer at once (the stubs leave that out); a list would cost 250 ns an id.
    return mx.array(ids)  # type: ignore[arg-type]


class Processors:
    """All that the rows ask to be done to logits before they are normalised; falsy if that is nothing."""

    def __init__(self, rows: Sequence[Sampling], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        pairs = [(row, id, bias) for row, r in enumerate(rows) for id, bias in r.logit_bias.items()]
        pairs = [(row, id, bias) for row, id, bias in pairs if 0 <= id < vocab_size]
        self._bias = [mx.array(column) for column in zip(*pairs, strict=True)]
        self._penalties: list[Penalty] = []
        for kind, neutral in (("repetition", (0.0, 1.0)), ("presence", (0.0,)), ("frequency", (0.0,))):
            asked = [
                (row, getattr(r, f"{kind}_context_size"), getattr(r, f"{kind}_penalty"))
                for row, r in enumerate(rows)
                if getattr(r, f"{kind}_penalty") not in neutral
            ]
            if asked:
                self._penalties.append(Penalty(asked, len(rows), kind))

    def __bool__(self) -> bool:
        return bool(self._bias or self._penalties)

    def apply(
        self,
        logits: mx.array,
        history: Sequence[Sequence[int]],
        inputs: mx.array,
        excluded: Sequence[Sequence[int]] | None,
    ) -> mx.array:
        """`logits` (B, V) float32, changed; the caller's array stays as it is. Lazy."""
        logits = mx.array(logits)
        if self._bias:
            rows, ids, values = self._bias
            logits = logits.at[rows, ids].add(values)
        for penalty in self._penalties:
            logits = penalty.apply(logits, history, inputs)
        if excluded is not None:
            pairs = [(r, i) for r, ids in enumerate(excluded) for i in ids if 0 <= i < self._vocab_size]
            if pairs:
                row, id = mx.array(pairs).T
                logits[row, id] = -mx.inf
        return logits
