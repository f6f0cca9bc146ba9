"""The next id of every row of a batch, each row with its own settings, as one lazy graph.

Owns mlx-lm's samplers (`mlx_lm.sample_utils.make_sampler`: top_p, min_p, XTC, top_k, in this order, all on
the distribution before temperature) and the reports of log-probabilities (after penalties and biases, before
temperature and filters). Evaluates nothing, keeps no state, refuses nothing: the API has checked the values.
Invariant: which id a row gets depends on its logits, settings and key of draws, never on its company. So rows
are grouped by what they ask for, and a row's own settings alone choose its path:

    greedy   argmax
    narrow   top_k ≤ 64, no XTC: the top ids are found through the maxima of blocks, all else is 64 wide
    sorted   top_p, or a top_k that needs the whole vocabulary in order
    plain    temperature, min_p, XTC: no order needed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from penstock.engine import draws
from penstock.engine.draws import NARROW
from penstock.engine.penalties import IdLists, Mask, Processors
from penstock.wire import Sampling

_BLOCK = 128
_OFF = math.inf


class Sampled(NamedTuple):
    """Lazy results of a step; what no row asked for is None. K is the largest `logprobs` of the batch."""

    tokens: mx.array
    """(B,) int32."""
    logprobs: mx.array | None
    """(B,) float32: of the ids in `tokens`."""
    top_ids: mx.array | None
    """(B, K) uint32: the likeliest first, the lower id first among equals. A row that asked for k takes k."""
    top_logprobs: mx.array | None
    """(B, K) float32; -inf for ids that a bias or an exclusion forbids."""


class _Group:
    """Rows of the batch that take the same path, and their settings as columns (R, 1)."""

    def __init__(self, path: str, members: list[int], rows: list[Sampling], vocab_size: int) -> None:
        self.path, self.members, self.keys = path, members, list(zip(members, rows, strict=True))
        self.index = mx.array(members, dtype=mx.uint32)
        nucleus = [r.top_p if 0 < r.top_p < 1 else _OFF for r in rows]
        self.top_p = _column(nucleus) if min(nucleus) < _OFF else None
        floors = [math.log(r.min_p) if r.min_p > 0 else -_OFF for r in rows]
        self.log_min_p = _column(floors) if max(floors) > -_OFF else None
        counts = [r.top_k if 0 < r.top_k < vocab_size else vocab_size for r in rows]
        self.top_k = mx.array([[count] for count in counts])
        self.cuts = min(counts) < vocab_size
        # A subnormal temperature has no float32 inverse; 1e30 leaves the likeliest ids and no NaN.
        self.inverse_t = _column([1 / max(r.temperature, 1e-30) for r in rows])
        self.xtc = any(r.xtc_probability > 0 for r in rows)

    def numbers(self, positions: Sequence[int], purpose: str) -> list[float]:
        """One draw a row; `positions` are those of the whole batch."""
        return [draws.uniform(r.seed, r.choice, positions[i], purpose) for i, r in self.keys]

    def xtc_thresholds(self, positions: Sequence[int]) -> list[float]:
        """Each row's threshold where XTC acts at this position, infinity where it doesn't."""
        draw = zip(self.keys, self.numbers(positions, draws.XTC), strict=True)
        return [r.xtc_threshold if number < r.xtc_probability else _OFF for (_, r), number in draw]


def _column(values: list[float] | list[int]) -> mx.array:
    return mx.array([[value] for value in values], dtype=mx.float32)


class SamplingBatch:
    """The settings of a batch's rows, as arrays. Immutable: made anew when a row joins or leaves."""

    def __init__(self, rows: Sequence[Sampling], vocab_size: int, xtc_special: Sequence[int] = ()) -> None:
        """`vocab_size`: the logits' width. `xtc_special`: ids that XTC spares (newline, end of turn)."""
        self.processors = Processors(rows, vocab_size)
        members: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            members.setdefault(_path(row, vocab_size), []).append(i)
        self.groups = [_Group(p, m, [rows[i] for i in m], vocab_size) for p, m in members.items()]
        order = [i for group in self.groups for i in group.members]
        self.restore = mx.argsort(mx.array(order)) if len(self.groups) > 1 else None
        self.logprobs = any(row.logprobs is not None for row in rows)
        self.top = min(vocab_size, max(row.logprobs or 0 for row in rows))
        self.candidates = max(self.top, min(NARROW, vocab_size) if "narrow" in members else 0)
        self.spared = [id for id in xtc_special if 0 <= id < vocab_size]


def _path(row: Sampling, vocab_size: int) -> str:
    if row.temperature == 0:
        return "greedy"
    has_k = 0 < row.top_k < vocab_size
    if has_k and row.top_k <= NARROW and row.xtc_probability <= 0:
        return "narrow"
    return "sorted" if has_k or 0 < row.top_p < 1 else "plain"


def sample(
    logits: mx.array,
    batch: SamplingBatch,
    positions: Sequence[int],
    history: IdLists,
    inputs: mx.array,
    *,
    excluded: IdLists | None = None,
    masks: Sequence[Mask] = (),
) -> Sampled:
    """The next id of each row: `logits` (B, V), any float type, computed in float32. Nothing is evaluated.

    `positions`: the index that each row's id will have in prompt + answer. `history`: each row's ids before
    the input id, at least its last (largest context size - 1), all for a context size of 0; best array('I').
    `inputs` (B,): the ids that `logits` follow, perhaps still in flight. `excluded`: ids that a row may not
    draw; `masks`: the ids that some rows may draw, and no others. A row whose every id is forbidden, or that
    has a NaN, gets any id of the vocabulary.
    """
    x = logits
    if batch.processors or any(excluded or ()) or masks:
        x = batch.processors.apply(logits, history, inputs, excluded or (), masks)
    top_ids = _top_ids(x, batch.candidates) if batch.candidates else x[:, :0]
    parts = []
    for group in batch.groups:
        own = x if batch.restore is None else x[group.index]
        if group.path == "greedy":
            parts.append(mx.argmax(own, axis=-1))
        elif group.path == "narrow":
            ids = top_ids[:, :NARROW] if batch.restore is None else top_ids[group.index, :NARROW]
            at = _pick(_narrow_weights(own, ids, group), group.numbers(positions, draws.TOKEN))
            parts.append(_at(ids, at))
        else:
            weights = _in_blocks(_weights(own.astype(mx.float32), group, positions, batch.spared), 0)
            block = _pick(weights.sum(axis=-1), group.numbers(positions, draws.TOKEN))
            inside = mx.take_along_axis(weights, mx.expand_dims(block, (1, 2)), axis=1).squeeze(1)
            parts.append(block * _BLOCK + _pick(inside, group.numbers(positions, draws.WITHIN)))
    tokens = parts[0] if batch.restore is None else mx.concatenate(parts)[batch.restore]
    chosen, top = None, None
    if batch.logprobs:
        x = x.astype(mx.float32)
        total = mx.logsumexp(x, axis=-1, keepdims=True)
        chosen = _at(x, tokens) - total.squeeze(-1)
        if batch.top:
            top_ids = top_ids[:, : batch.top]
            top = mx.take_along_axis(x, top_ids, axis=-1) - total
    return Sampled(tokens.astype(mx.int32), chosen, None if top is None else top_ids, top)


def _top_ids(x: mx.array, k: int) -> mx.array:
    """(R, k) ids of the k largest of each row, the largest first and the lower id first among equals."""
    rows, width = x.shape
    if width <= 2 * k * _BLOCK:
        return mx.argsort(-x, axis=-1)[:, :k]
    # The k largest lie in the k blocks of ids with the largest maxima, so only those are sorted.
    blocks = _in_blocks(x, -mx.inf)
    best = mx.sort(mx.argsort(-blocks.max(axis=-1), axis=-1)[:, :k], axis=-1)
    found = mx.take_along_axis(blocks, best[:, :, None], axis=1).reshape(rows, k * _BLOCK)
    at = mx.argsort(-found, axis=-1)[:, :k]
    return mx.take_along_axis(best, at // _BLOCK, axis=-1) * _BLOCK + at % _BLOCK


def _at(x: mx.array, columns: mx.array) -> mx.array:
    """(R,) of `x` (R, N): in each row what stands in its column."""
    return mx.take_along_axis(x, mx.expand_dims(columns, -1), axis=-1).squeeze(-1)


def _in_blocks(x: mx.array, fill: float) -> mx.array:
    """`x` (R, V) as (R, blocks, 128), the last block filled up."""
    rows, width = x.shape
    if missing := -width % _BLOCK:
        x = mx.pad(x, [(0, 0), (0, missing)], constant_values=fill)
    return x.reshape(rows, -1, _BLOCK)


def _narrow_weights(x: mx.array, ids: mx.array, group: _Group) -> mx.array:
    """(R, K) weights to draw by of `ids` (R, K), the top ids of `x` (R, V) in falling order."""
    values = mx.take_along_axis(x, ids, axis=-1).astype(mx.float32)
    below = values - values[:, :1]
    keep = mx.arange(ids.shape[1])[None] < group.top_k
    if group.top_p is not None:
        total = mx.exp(mx.logsumexp(x.astype(mx.float32), axis=-1, keepdims=True) - values[:, :1])
        above = mx.cumsum(mx.exp(below), axis=-1, inclusive=False)
        # Through the value of the last one, so that its equals stay too.
        keep &= below >= mx.where(above < group.top_p * total, below, 0).min(axis=-1, keepdims=True)
    if group.log_min_p is not None:
        keep &= below >= group.log_min_p
    return mx.where(keep, mx.exp(below * group.inverse_t), 0)


def _weights(x: mx.array, group: _Group, positions: Sequence[int], spared: list[int]) -> mx.array:
    """(R, V) weights to draw by: filters put -inf into `x` (R, V) float32, in mlx-lm's order."""
    largest = x.max(axis=-1, keepdims=True)
    if group.top_p is not None:
        x = mx.where(_outside_nucleus(x, group.top_p), -mx.inf, x)
    if group.log_min_p is not None:
        x = mx.where(x - largest < group.log_min_p, -mx.inf, x)
    if group.xtc and min(thresholds := group.xtc_thresholds(positions)) < _OFF:
        shares = mx.softmax(x, axis=-1)
        least = mx.where(shares > _column(thresholds), shares, mx.inf).min(axis=-1, keepdims=True)
        removed = shares > least
        if spared:
            removed[:, mx.array(spared)] = False
        x = mx.where(removed, -mx.inf, x)
        largest = x.max(axis=-1, keepdims=True)
    if group.cuts:
        x = _keep_top_k(x, group.top_k)
    return mx.exp((x - largest) * group.inverse_t)


def _outside_nucleus(x: mx.array, top_p: mx.array) -> mx.array:
    """Which ids top_p drops: step by step what mlx-lm computes, so that equal sums round to equal sets."""
    x = x - mx.logsumexp(x, axis=-1, keepdims=True)
    rising = mx.sort(x, axis=-1)
    shares = mx.exp(rising)
    above = mx.cumsum(shares, axis=-1, reverse=True, inclusive=False)
    dropped = (above >= top_p * (above[:, :1] + shares[:, :1])).sum(axis=-1, keepdims=True)
    return x < mx.take_along_axis(rising, dropped, axis=-1)


def _keep_top_k(x: mx.array, top_k: mx.array) -> mx.array:
    """`x` (R, V) with -inf for all but `top_k` (R, 1) ids, the lower id first among equals."""
    kth = mx.take_along_axis(mx.sort(x, axis=-1), x.shape[1] - top_k, axis=-1)
    above, equal = x > kth, x == kth
    room = top_k - above.sum(axis=-1, keepdims=True)
    return mx.where(above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= room)), x, -mx.inf)


def _pick(weights: mx.array, numbers: list[float]) -> mx.array:
    """(R,) the place where the running sum of `weights` (R, N) passes each row's number times the whole.

    Always a place of positive weight, however sums are rounded: the first that passes, or else the first.
    """
    running = mx.cumsum(weights, axis=-1)
    passed = running > _column(numbers) * running[:, -1:]
    return mx.argmax((weights > 0) * (passed + 1), axis=-1)
