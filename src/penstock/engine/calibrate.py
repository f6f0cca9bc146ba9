"""Measures what steps of this model hold on this device, once at load: the samples that `predict` fits.

A long context is faked: a row of zeros with its offset set, because what a step allocates does not depend on
what it reads. Short steps come first, and each tells whether the next is affordable, in time and in bytes.
Refuses nothing; a step that fails to run here would fail in service, so its error goes up. Invariant: the
engine holds afterwards what it held before.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache
from msgspec.structs import replace

from penstock.engine import device, pace
from penstock.engine.batch import Runner
from penstock.engine.draws import NARROW
from penstock.engine.gated_delta import CHUNK, THRESHOLD
from penstock.engine.rows import Row
from penstock.engine.sampler import SamplingBatch, sample
from penstock.memory.costs import CHUNK_FLOOR, Costs
from penstock.memory.predict import Sample, Transient, fit, fit_curve
from penstock.wire import Sampling

LONG = 16_384
"""The longest faked context: what grows with the context shows well before."""
LEAST_LONG = 2_048
"""The longest context is not shortened below this, however slow the device."""
SHORT_CHUNKS = (16, 64)
"""Lengths measured with context where longer ones take too long (scores depend on the length alone there)."""
PATIENCE = 1.2
"""Seconds for each part that may be cut short; processor time on the CPU back end, load costs none."""
ROWS = 4
RUNS, DRAWS = 3, 10
"""How often a step is measured, and a draw: how much is free by then differs from run to run."""
LEAST_PAGE = 4_096
"""A buffer may be larger than was asked for by two pages, at least of this size: one that it is rounded up
by, one that a freed buffer has too much which is taken again."""

USUAL = Sampling(
    temperature=1.0,
    top_p=0.9,
    min_p=0.01,
    top_k=100,
    logprobs=20,
    logit_bias={0: 1.0},
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
)
COSTLY = replace(USUAL, xtc_probability=1.0, xtc_threshold=0.1)
"""Everything that a request can ask for, without XTC and with it: no draw holds more."""
LEAN = (Sampling(), Sampling(temperature=1.0, top_p=0.9, min_p=0.01, top_k=NARROW, logprobs=20))
"""What most ask for: the likeliest id, or one of a few."""


def costs_of(runner: Runner, backend: str | None = None) -> Costs:
    """What a row costs, from a row of one position; `backend`: another than computes here."""
    row = runner.open(1)
    runner.build(row, [0])
    positions = [[_position(x) for x in (cache.keys, cache.values)] for cache in row.kv]
    kv = [sum(sizes) for sizes in positions]
    buffers = len(row.arrays())
    windows = [_full_window(leaf) for leaf in row.leaves if isinstance(leaf, RotatingKVCache)]
    states = sum(int(x.nbytes) for cache in row.states for x in cache.cache if x is not None)
    runner.close(row)
    # A window grows by concatenation until it is full: one of them may exist twice.
    fixed = sum(windows) + max(windows, default=0) + states
    page = device.page(backend)
    rounding = 2 * max(LEAST_PAGE, page) * buffers
    rounding += sum(lcm(page, size) - max(page, size) for sizes in positions for size in sizes)
    return Costs(sum(kv), max(kv, default=0), fixed, states, buffers, rounding)


def calibrate(
    runner: Runner,
    vocab_size: int,
    *,
    room: int,
    context_length: int,
    longest: int,
    pipelined: bool = True,
    per_score: float = 0.0,
    beat: Callable[[], object] = lambda: None,
) -> Transient:
    """The predictor of this model, from measured chunks and decode steps within `room` bytes.

    `longest`: ids of the longest chunk in service; `pipelined`: whether steps are launched ahead there;
    `per_score`: see `fit_curve`; `beat` is called before each measured step.
    """
    bench = _Bench(runner, vocab_size, room, beat, pipelined)
    longest = max(1, min(longest, context_length - 2))
    alone = bench.alone(longest)
    costs = costs_of(runner)
    block = CHUNK if costs.states and bench.fills_up(alone) else 1
    quarter = room // (4 * max(1, costs.kv_per_token))  # ids of a row that takes so much of it
    # A chunk may be as long as the model's context; what context costs is to be seen even then.
    spare = min(longest, max(*SHORT_CHUNKS, context_length // 4))
    long = max(1, min(LONG, context_length - spare - 2, max(LEAST_LONG, quarter)))
    deep = bench.deep([n for n in (s.chunks[0][0] for s in alone) if n <= spare], long)
    steps = [bench.step(rows, k) for rows, k in sorted({(1, 1), (ROWS, 1), (1, long)})]
    draws = bench.draws()
    bench.close()
    return Transient(fit_curve(alone, deep, per_score, block), fit(steps), *draws)


@dataclass
class _Bench:
    """Takes the samples, and knows how long they took."""

    runner: Runner
    vocab_size: int
    room: int
    beat: Callable[[], object] = lambda: None
    pipelined: bool = True
    left: float = PATIENCE
    rows: list[Row] = field(default_factory=list)

    def alone(self, longest: int) -> list[Sample]:
        """Chunks without context, doubling in length as long as time and room allow."""
        samples: list[Sample] = []
        took = 0.0
        for length in _lengths(longest):
            expected = int(5 * samples[-1].peak) if samples else 0  # twice as long: scores are four times
            if length > CHUNK_FLOOR and (3 * took > self.left or expected > self.room):
                break
            took, sample = self._chunk(length, 1)
            samples.append(sample)
        return samples

    def fills_up(self, alone: list[Sample]) -> bool:
        """Whether a chunk holds what whole blocks do: one that begins a block shows it."""
        curve, length = fit_curve(alone, []), CHUNK_FLOOR + 1
        if curve.lengths[-1] < CHUNK_FLOOR:
            return False
        _, seen = self._chunk(length, 1)
        return seen.peak > 1.1 * curve.alone(length)  # a quarter more where they hold the most

    def deep(self, lengths: list[int], long: int) -> list[Sample]:
        """Chunks of two lengths, each after half of `long` ids and after all of them.

        None where nothing depends on the context.
        """
        (row,) = self._stand(1, 1, 1)
        constant = len(row.states) == len(row.leaves)
        self.close()
        if constant or long < 4:
            return []
        self.left = PATIENCE
        short, *rest = [n for n in SHORT_CHUNKS if n <= lengths[-1]] or lengths[-1:]
        took, _ = self._chunk(short, min(1024, long))
        while long > LEAST_LONG and took * long / 1024 * 7 > self.left:
            long //= 2
        pairs = [[self._chunk(n, k) for k in (long // 2, long)] for n in (short, *rest)]
        # A quick device shows its long chunks' kernels, too.
        for length in [n for n in lengths if n >= CHUNK_FLOOR]:
            took, far = pairs[-1][1]
            growth = length / far.chunks[0][0]
            expected = int(2 * growth * far.peak)
            if took * growth * 2 > self.left or expected > self.room:
                break
            pairs.append([self._chunk(length, k) for k in (long // 2, long)])
        return [sample for pair in pairs for _, sample in pair]

    def step(self, count: int, context: int, sampling: Sampling = LEAN[0]) -> Sample:
        """Decode steps, with the simplest draws: two, the second launched before the first is read.

        In service each has a lease of its own. But a GPU that is busy frees nothing while a step is launched,
        and may have to copy what the step before still reads; so this is what one step may hold. Where no
        step is launched ahead, the second one waits for the first.
        """
        peak = max(self._steps(count, context, sampling) for _ in range(RUNS))
        return Sample(tuple((1, context) for _ in range(count)), peak)

    def _steps(self, count: int, context: int, sampling: Sampling) -> int:
        """The peak in bytes of such steps."""
        rows = self._stand(count, context, 4)
        batch = SamplingBatch([sampling] * count, self.vocab_size)
        history = [array("I", [0]) * 64] * count
        inputs = mx.zeros(count, mx.int32)
        mx.eval(self.runner.decode(rows, inputs))  # stacks the states
        base = _settled()
        first = sample(self.runner.decode(rows, inputs), batch, [context + 1] * count, history, inputs)
        mx.async_eval(first)  # type: ignore[no-untyped-call]
        if not self.pipelined:
            mx.synchronize()
        second = sample(
            self.runner.decode(rows, first.tokens), batch, [context + 2] * count, history, first.tokens
        )
        mx.eval(second)
        peak = int(mx.get_peak_memory()) - base
        self.close()
        return peak

    def draw(self, *rows: Sampling) -> int:
        """Bytes that drawing these rows' ids holds."""
        self.beat()
        count, batch = len(rows), SamplingBatch(rows, self.vocab_size)
        logits, inputs = mx.zeros((count, self.vocab_size)), mx.zeros(count, mx.int32)
        mx.eval(logits, inputs)
        base = _settled()
        history = [array("I", [0])] * count
        mx.eval(sample(logits + 1, batch, [1] * count, history, inputs, excluded=[(0,)] * count))
        return int(mx.get_peak_memory()) - base

    def draws(self) -> tuple[int, int, int]:
        """Bytes that a usual draw holds, a costly one, and a lean one."""
        kinds = [(USUAL,), (COSTLY,), *((s,) for s in LEAN), *((USUAL, s) for s in LEAN)]
        usual, costly, *lean = (max(self.draw(*rows) for _ in range(DRAWS)) for rows in kinds)
        # In company the logits of a lean draw's row are copied and reported of as the others' are.
        alone, beside = max(lean[: len(LEAN)]), max(lean[len(LEAN) :])
        return usual, max(usual, costly), max(alone, beside - usual)

    def close(self) -> None:
        """Let go of the rows."""
        for row in self.rows:
            self.runner.close(row)
        self.rows = []
        mx.clear_cache()

    def _chunk(self, length: int, context: int) -> tuple[float, Sample]:
        """A chunk after `context` ids, and the seconds it took.

        On a GPU the first run compiles kernels.
        """
        runs = [self._run(length, context) for _ in range(RUNS)]
        took = min(seconds for seconds, _ in runs)
        self.left -= took
        layers = tuple(max(peaks) for peaks in zip(*(peaks for _, peaks in runs), strict=True))
        return took, Sample(((length, context),), max(layers), layers)

    def _run(self, length: int, context: int) -> tuple[float, list[int]]:
        """Seconds of one chunk, and the peak in bytes of each of its layers."""
        (row,) = self._stand(1, context, length)
        base = _settled()
        peaks: list[int] = []

        def done() -> None:
            peaks.append(int(mx.get_peak_memory()) - base)
            mx.reset_peak_memory()

        began = _clock()
        with pace.watched(done):
            arrays = self.runner.prefill(row, [0] * length)
        mx.eval(arrays)
        done()
        took = _clock() - began
        del arrays
        self.close()
        return took, peaks

    def _stand(self, count: int, context: int, more: int) -> list[Row]:
        """Rows that stand at `context`, at least 1, and have room for `more`."""
        self.beat()
        for _ in range(count):
            row = self.runner.open(context + more + 1)
            self.rows.append(row)
            mx.eval(self.runner.prefill(row, [0]))
            for leaf in row.leaves:
                if isinstance(leaf, RotatingKVCache):
                    if context > 1:
                        _fill_window(leaf, context)
                elif hasattr(leaf, "offset"):
                    leaf.offset = context
            row.length = context
        return self.rows


def _lengths(longest: int) -> list[int]:
    """Chunk lengths to measure: doubling, both sides of where recurrent layers change, the longest."""
    lengths = [n for n in (4, THRESHOLD - 1, THRESHOLD, 64, *(128 << i for i in range(20))) if n < longest]
    return [*lengths, longest]


def _clock() -> float:
    return time.process_time() if device.backend() == "cpu" else time.monotonic()


def _full_window(cache: Any) -> int:
    return (_position(cache.keys) + _position(cache.values)) * int(cache.max_size)


def _position(buffer: Any) -> int:
    """Bytes of one position of keys or values."""
    return int(buffer.nbytes // buffer.shape[2])


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
