"""Measures what steps of this model hold on this device, once at load: the samples that `predict` fits.

A long context is faked: a row of zeros with its offset set, because what a step allocates does not depend on
what it reads. Refuses nothing; a step that fails to run here would fail in service, so its error goes up.
Invariant: the engine holds what it held before, and no measured step is larger than `room` bytes allow.
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from penstock.engine.batch import Runner
from penstock.engine.rows import Row
from penstock.engine.sampler import SamplingBatch, sample
from penstock.memory.costs import CHUNK_FLOOR, Costs
from penstock.memory.predict import Sample, Transient, fit
from penstock.wire import Sampling

LONG = 16_384
"""The longest faked context: what grows with the context shows well before."""
PATIENCE = 1.5
"""Seconds that a measured chunk may take; slower machines are measured with shorter ones."""
ROWS = 4


def costs_of(runner: Runner) -> Costs:
    """What a row costs, from a row of one position."""
    row = runner.open(1)
    mx.eval(runner.prefill(row, [0]))
    kv = [int(mx.get_array_buffer_size([c.keys, c.values])) for c in row.kv]
    buffers = len(row.arrays())
    windows = sum(_full_window(leaf) for leaf in row.leaves if isinstance(leaf, RotatingKVCache))
    states = sum(int(mx.get_array_buffer_size(list(c.cache))) for c in row.states)
    runner.close(row)
    return Costs(sum(kv), max(kv, default=0), windows + states, states, buffers)


def calibrate(runner: Runner, vocab_size: int, *, room: int, context_length: int, longest: int) -> Transient:
    """The predictor of this model, from measured chunks and decode steps within `room` bytes."""
    per_token = max(1, costs_of(runner).kv_per_token)
    longest = max(1, min(longest, context_length - 3))
    long = max(0, min(LONG, context_length - longest - 3, room // (4 * per_token * ROWS)))
    chunk = _affordable(runner, longest, long + 1)
    short = max(1, min(CHUNK_FLOOR, chunk // 2))
    # The first step of a shape may compile; its peak counts as any other's, so nothing is thrown away.
    chunks = [_chunk(runner, n, k) for n in {short, chunk} for k in {1, long // 2 + 1, long + 1}]
    steps = [_step(runner, rows, k, vocab_size) for rows in (1, ROWS) for k in {1, long // 2 + 1, long + 1}]
    mx.clear_cache()
    return Transient(fit(chunks), fit(steps))


def _full_window(cache: Any) -> int:
    per_position = sum(int(x.nbytes // x.shape[2]) for x in (cache.keys, cache.values))
    return per_position * int(cache.max_size)


def _affordable(runner: Runner, longest: int, context: int) -> int:
    """The longest chunk that runs within the patience after `context` ids."""
    trial = min(CHUNK_FLOOR, longest)
    _chunk(runner, trial, context)
    began = time.monotonic()
    _chunk(runner, trial, context)
    per_id = (time.monotonic() - began) / trial
    return max(trial, min(longest, int(PATIENCE / max(per_id, 1e-9))))


def _chunk(runner: Runner, length: int, context: int) -> Sample:
    row = _faked(runner, context, length)
    base = _settled()
    arrays = runner.prefill(row, [0] * length)
    mx.eval(arrays)
    peak = mx.get_peak_memory() - base
    del arrays
    runner.close(row)
    return Sample(((length, context),), int(peak))


def _step(runner: Runner, count: int, context: int, vocab_size: int) -> Sample:
    """Two decode steps, the second launched before the first is read, as in service."""
    rows = [_faked(runner, context, 4) for _ in range(count)]
    batch = SamplingBatch([Sampling(temperature=1.0, top_p=0.9, logprobs=1)] * count, vocab_size)
    inputs = mx.zeros(count, mx.int32)
    mx.eval(runner.decode(rows, inputs))  # stacks the states
    base = _settled()
    first = sample(runner.decode(rows, inputs), batch, [context + 1] * count, [], inputs)
    mx.async_eval(first)  # type: ignore[no-untyped-call]
    second = sample(runner.decode(rows, first.tokens), batch, [context + 2] * count, [], first.tokens)
    mx.eval(second)
    peak = mx.get_peak_memory() - base
    del first, second
    for row in rows:
        runner.close(row)
    return Sample(tuple((1, context + i % 2) for i in range(count)), int(peak))


def _faked(runner: Runner, context: int, more: int) -> Row:
    """A row that stands at `context`, at least 1, and has room for `more`."""
    row = runner.open(context + more + 1)
    mx.eval(runner.prefill(row, [0]))
    for leaf in row.leaves:
        if isinstance(leaf, RotatingKVCache):
            if context > 1:
                _fill_window(leaf, context)
        elif hasattr(leaf, "offset"):
            leaf.offset = context
    row.length = context
    return row


def _fill_window(cache: Any, context: int) -> None:
    held = min(context, int(cache.max_size))
    cache.keys, cache.values = (
        mx.zeros((*x.shape[:2], held, x.shape[3]), x.dtype) for x in (cache.keys, cache.values)
    )
    mx.eval(cache.keys, cache.values)
    cache.offset, cache._idx = context, held


def _settled() -> int:
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    return int(mx.get_active_memory())
