"""What changes logits before they are normalised: biases, penalties for repeated ids, forbidden ids.

Owns mlx-lm's logits processors (`mlx_lm.sample_utils.make_logits_processors`) for a whole batch at once, in
its order: bias, repetition, presence, frequency; forbidden ids last, so that no bias brings one back. Each is
a gather and a scatter of the (row, id) pairs it touches: nothing is as wide as the vocabulary but the logits.
The id that a row has just consumed may still be in flight; it joins the pairs on the device, unread.
Invariant: a row's logits depend on its own settings and ids only. Ids outside the vocabulary are ignored.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import mlx.core as mx

from penstock.wire import Sampling

IdLists = Sequence[Sequence[int]]
Mask = tuple[int, bytes]
"""A row, and a bit for each id of the vocabulary (or more): whether it may be drawn."""
_Contexts = tuple[tuple[int, int], ...]
"""(row, context size) of the rows that have a penalty. A size of 0 is the whole context, as in mlx-lm."""

_BITS = [[byte >> bit & 1 for bit in range(8)] for byte in range(256)]


class Processors:
    """All that the rows ask to be done to logits before they are normalised; falsy if that is nothing."""

    def __init__(self, rows: Sequence[Sampling], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        biases = [(row, id, bias) for row, r in enumerate(rows) for id, bias in r.logit_bias.items()]
        biases = [(row, id, bias) for row, id, bias in biases if 0 <= id < vocab_size]
        self._bias = [mx.array(column) for column in zip(*biases, strict=True)]
        self._penalties: list[tuple[str, _Contexts, mx.array]] = []
        for kind, neutral in (("repetition", (0, 1)), ("presence", (0,)), ("frequency", (0,))):
            strengths = [getattr(r, f"{kind}_penalty") for r in rows]
            sizes = [getattr(r, f"{kind}_context_size") for r in rows]
            contexts = tuple((i, size) for i, size in enumerate(sizes) if strengths[i] not in neutral)
            if contexts:
                self._penalties.append((kind, contexts, mx.array(strengths, dtype=mx.float32)))

    def __bool__(self) -> bool:
        return bool(self._bias or self._penalties)

    def apply(
        self,
        logits: mx.array,
        history: IdLists,
        inputs: mx.array,
        excluded: IdLists,
        masks: Sequence[Mask] = (),
    ) -> mx.array:
        """`logits` (B, V) as float32 and changed; the caller's array stays as it is. Lazy."""
        logits = logits.astype(mx.float32)
        if self._bias:
            rows, ids, values = self._bias
            logits = logits.at[rows, ids].add(values)
        pairs: dict[_Contexts, list[mx.array]] = {}
        for kind, contexts, strengths in self._penalties:
            if contexts not in pairs:
                pairs[contexts] = _pairs(contexts, history, inputs)
            logits = _penalised(logits, kind, pairs[contexts], strengths)
        if masks:
            masked = mx.array([row for row, _ in masks], dtype=mx.uint32)
            logits[masked] = mx.where(_allowed(masks, self._vocab_size), logits[masked], -mx.inf)
        forbidden = [(r, i) for r, ids in enumerate(excluded) for i in ids if 0 <= i < self._vocab_size]
        if forbidden:
            rows, ids = mx.array(forbidden).T
            logits[rows, ids] = -mx.inf
        return logits


def _allowed(masks: Sequence[Mask], width: int) -> mx.array:
    """The masks as (R, width) of booleans: each byte's eight bits are looked up on the device."""
    packed = array("B", b"".join(mask for _, mask in masks))
    rows = mx.array(packed, dtype=mx.uint8).reshape(len(masks), -1)  # type: ignore[arg-type]
    return mx.array(_BITS, dtype=mx.bool_)[rows].reshape(len(masks), -1)[:, :width]


def _penalised(logits: mx.array, kind: str, pairs: list[mx.array], strengths: mx.array) -> mx.array:
    rows, ids = pairs
    strength = strengths[rows]
    if kind == "frequency":
        return logits.at[rows, ids].subtract(strength)
    # Pairs that occur twice write the same value twice: these two count an id once.
    chosen = logits[rows, ids]
    if kind == "repetition":
        logits[rows, ids] = mx.where(chosen < 0, chosen * strength, chosen / strength)
    else:
        logits[rows, ids] = chosen - strength
    return logits


def _pairs(contexts: _Contexts, history: IdLists, inputs: mx.array) -> list[mx.array]:
    """The rows and the ids of all contexts, one after the other; an id that occurs twice is there twice."""
    ids, rows = array("I"), array("I")
    for row, size in contexts:
        past = history[row]
        tail = past[max(0, len(past) - size + 1) :] if size else past
        ids.extend(tail)
        rows.extend(array("I", (row,)) * len(tail))
    members = mx.array([row for row, _ in contexts], dtype=mx.uint32)
    newest = inputs[members].astype(mx.uint32)
    return [mx.concatenate([_indices(rows), members]), mx.concatenate([_indices(ids), newest])]


def _indices(ids: array[int]) -> mx.array:
    # MLX reads the buffer at once (the stubs leave that out); a list would cost 250 ns an id.
    return mx.array(ids, dtype=mx.uint32)  # type: ignore[arg-type]
