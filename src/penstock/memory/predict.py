"""Predicts what a step holds beyond its rows while it runs. Pure arithmetic over a few fitted numbers.

The transient peak of a prefill chunk of c ids on top of k computed ones is a `Curve`:

    max(alone(c), deep(c, k))

`alone` is a table of measured peaks without context (activations, experts, chunked gated-delta states: no
formula fits them all). What grows with the context is attention: the scores of one layer where no fused
kernel runs, keys that are copied or expanded. Which of them differs with the chunk's length, so each length
that was measured has a `Line` over the keys, c + k; layers run one after the other, so in the whole it shows
only where it exceeds the other layers' peak, and it is looked for in each layer's own. A decode step of rows
with lengths k1…kB is `Scalars`: base + per_id · B + per_score · (k1 + … + kB); it has logits and draws, and
other kernels.

Fits are raised until no measured step exceeds its prediction. `Correction` follows what is measured later: it
rises at once and falls by decay, never a lasting maximum; it shapes chunks and margins, never admission.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, groupby, pairwise

MARGIN = 1.15
"""What the ledger holds above the fitted peak: run-ahead differs from run to run, and kernels by length."""
SLACK = 256 << 10
"""Bytes above that, for what small buffers are rounded up to."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step: chunk lengths with the ids computed before them, and its peak in bytes."""

    chunks: tuple[tuple[int, int], ...]
    peak: int
    layers: tuple[int, ...] = ()
    """Of a chunk that runs layer by layer: the peak of each."""

    def of(self, layers: Iterable[int]) -> int:
        """The highest peak of these layers, or 0; a step of which no layers are known is one."""
        return max(((self.layers or (self.peak,))[i] for i in layers), default=0)


@dataclass(frozen=True, slots=True)
class Scalars:
    """What was fitted for one kind of step, in bytes: of a step, of an id, of a (query, key) pair."""

    base: float
    per_id: float
    per_score: float

    def peak(self, chunks: Sequence[tuple[int, int]]) -> int:
        """Predicted peak of a step over (chunk, ids computed before), without margin."""
        return math.ceil(_dot(_features(chunks), (self.base, self.per_id, self.per_score)))


@dataclass(frozen=True, slots=True)
class Line:
    """Peak in bytes of a chunk of `length` ids that attends to k keys, its own too: start + per_key · k."""

    length: int
    start: float
    per_key: float


@dataclass(frozen=True, slots=True)
class Curve:
    """What was fitted for prefill chunks, in bytes: see the head of this module."""

    lengths: tuple[int, ...]
    """Chunk lengths that were measured without context, rising."""
    peaks: tuple[float, ...]
    lines: tuple[Line, ...] = ()
    """Of the lengths that were measured with context, rising."""
    block: int = 1
    """Ids that recurrent layers compute at a time: a longer chunk is filled up to a multiple of it."""

    def peak(self, chunks: Sequence[tuple[int, int]]) -> int:
        """Predicted peak of (chunk, ids computed before) one after the other, without margin."""
        filled = [(c if c <= self.block else c + -c % self.block, k) for c, k in chunks]
        return math.ceil(max(max(self.alone(c), self.deep(c, k)) for c, k in filled))

    def alone(self, length: int) -> float:
        """Peak of a chunk without context."""
        if length > self.lengths[-1]:
            return self._beyond_the_table(length)
        return _between(self.lengths, self.peaks, length)

    def deep(self, length: int, context: int) -> float:
        """Peak of what depends on the context: never below a shorter chunk's, whatever kernel that has."""
        if not self.lines:
            return 0.0
        lengths = tuple(line.length for line in self.lines)
        peaks: list[float] = []
        for line in self.lines:
            peaks.append(max(line.start + line.per_key * (context + length), peaks[-1] if peaks else 0.0))
        if length <= lengths[-1]:
            return _between(lengths, peaks, length)
        # Beyond the longest that was measured: keys that are expanded cost the same for any chunk, scores do
        # not. Where both were seen the last two lengths tell them apart; else all of it is taken for scores.
        if len(lengths) > 1 and all(line.start > 0 for line in self.lines[-2:]):
            return peaks[-1] + (peaks[-1] - peaks[-2]) / (lengths[-1] - lengths[-2]) * (length - lengths[-1])
        return peaks[-1] * length / lengths[-1]

    def _beyond_the_table(self, length: int) -> float:
        """The parabola through the last three points if it bends upwards (scores of the chunk itself)."""
        a, b, c = (0, 0, *self.lengths)[-3:]
        x, y, z = (0.0, 0.0, *self.peaks)[-3:]
        slope = (z - y) / (c - b)
        bend = (slope - (y - x) / (b - a)) / (c - a) if b > a else 0.0
        score = self.lines[-1].per_key / self.lines[-1].length if self.lines else 0.0
        return z + (length - c) * (slope + max(bend, score) * (length - b))


def _between(lengths: Sequence[int], peaks: Sequence[float], length: int) -> float:
    """The straight line between the two nearest of `lengths`; the first and last value outside of them."""
    if length <= lengths[0]:
        return peaks[0]
    for (a, low), (b, high) in pairwise(zip(lengths, peaks, strict=True)):
        if length <= b:
            return low + (high - low) * (length - a) / (b - a)
    return peaks[-1]


@dataclass(frozen=True, slots=True)
class Transient:
    """The predictor of a model on a device: of a prefill chunk and of a decode step."""

    chunk: Curve | Scalars
    step: Scalars
    usual_draw: int = 0
    """Bytes of a row's draw, beside what `step` knows of: whatever it asks for but XTC."""
    costly_draw: int = 0
    """The same where it asks for XTC, which sorts the whole vocabulary twice."""
    lean_draw: int = 0
    """The same where it takes the likeliest id, or one of a few, and changes no logits."""
    constants: int = 0
    """Bytes that the model keeps beside its weights once it has run: masks, frequencies."""

    def prefill(self, length: int, context: int) -> int:
        """Peak in bytes of a prefill chunk of `length` ids after `context` computed ones, with margin."""
        return with_margin(self.chunk.peak([(length, context)]))

    def decode(self, lengths: Iterable[int], costly: int = 0, lean: int = 0) -> int:
        """Peak in bytes of a decode step over rows of these lengths, with margin.

        `costly`, `lean`: how many of them make such a draw.
        """
        rows = [(1, length) for length in lengths]
        draws = costly * self.costly_draw + lean * self.lean_draw
        draws += (len(rows) - costly - lean) * self.usual_draw
        return with_margin(self.step.peak(rows) + draws)

    def longest_chunk(self, room: int, context: int, most: int) -> int:
        """The longest chunk, at most `most`, whose peak fits into `room` bytes; 0 if not even one id does."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.prefill(middle, context) <= room:
                low = middle
            else:
                high = middle - 1
        return low


def with_margin(peak: float) -> int:
    """What the ledger holds for a predicted peak; nothing for nothing."""
    return math.ceil(MARGIN * peak + SLACK) if peak > 0 else 0


def _features(chunks: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    ids = sum(chunk for chunk, _ in chunks)
    return 1.0, float(ids), float(sum(chunk * (context + chunk) for chunk, context in chunks))


def fit(samples: Sequence[Sample]) -> Scalars:
    """Scalars ≥ 0 with the least squared relative error, raised until no sample exceeds the fitted peak.

    Relative, because a long context's peak would drown a short one's. Solved over all subsets of the three
    features: with three of them that is exact and needs no library. Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("nothing was measured")
    rows = [(_features(s.chunks), float(max(1, s.peak))) for s in samples]
    best: tuple[float, tuple[float, ...]] = (float("inf"), (0.0, 0.0, 0.0))
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            scalars = _solve(rows, chosen)
            if scalars is None or min(scalars) < 0:
                continue
            error = sum((_dot(features, scalars) / peak - 1) ** 2 for features, peak in rows)
            if error < best[0] - 1e-12:
                best = error, scalars
    raised = max(peak / max(_dot(features, best[1]), 1.0) for features, peak in rows)
    base, per_id, per_score = (scalar * max(1.0, raised) for scalar in best[1])
    return Scalars(base, per_id, per_score)


def fit_curve(
    alone: Sequence[Sample], deep: Sequence[Sample], per_score: float = 0.0, block: int = 1
) -> Curve:
    """The curve through chunks without context, and through those with: two contexts for each length.

    No sample exceeds its prediction. `deep` has lengths of `alone`; or none: no layer's work depends on the
    context.
    `per_score`: bytes of a (query, key) pair that attention must be expected to hold where other layers hid
    it in all that was measured. `block`: see `Curve`. Raises ValueError without `alone`.
    """
    if not alone:
        raise ValueError("nothing was measured")
    table = {_length(sample): float(sample.peak) for sample in sorted(alone, key=_length)}
    known = {_length(sample): sample for sample in alone}
    lines = []
    for length, samples in groupby(sorted(deep, key=lambda s: s.chunks), _length):
        *_, near, far = samples
        growing, rest = _growing(near, far)
        table[length] = max(table[length], near.of(rest), far.of(rest))
        lines.append(_line(known[length], near, far, growing, per_score))
    return Curve(tuple(table), tuple(accumulate(table.values(), max)), tuple(lines), block)


def _length(sample: Sample) -> int:
    return sample.chunks[0][0]


def _growing(near: Sample, far: Sample) -> tuple[list[int], list[int]]:
    """The layers that keys add to, and the others; all layers where they add to none."""
    growth = [far.of([i]) - near.of([i]) for i in range(len(near.layers) or 1)]
    least = max(growth) / 2 if max(growth) > 0 else min(growth)
    return [i for i, g in enumerate(growth) if g >= least], [i for i, g in enumerate(growth) if g < least]


def _line(known: Sample, close: Sample, distant: Sample, layers: Sequence[int], per_score: float) -> Line:
    """What keys add to a chunk's `layers`, whose peak without context is known."""
    length = _length(known)
    (near, low), (far, high) = ((s.chunks[0][1] + length, s.of(layers)) for s in (close, distant))
    shows = 1.05 * known.of(layers)
    flat = high <= shows
    if low > shows or (flat and not per_score):
        slope = max(0.0, (high - low) / (far - near))
        start = high - slope * far if slope else max(low, high)
        if start >= 0:
            return Line(length, start, slope)
    # Scores are hidden at `near`, or all the way. They can't exceed the whole peak.
    most = high / far
    return Line(length, 0.0, min(most, per_score * length) if flat else most)


def _dot(features: Sequence[float], scalars: Sequence[float]) -> float:
    return sum(f * s for f, s in zip(features, scalars, strict=True))


def _solve(
    rows: Sequence[tuple[tuple[float, ...], float]], chosen: tuple[int, ...]
) -> tuple[float, ...] | None:
    """Least squares of relative errors over the chosen features (normal equations); None if singular."""
    n = len(chosen)
    matrix = [[0.0] * (n + 1) for _ in range(n)]
    for features, peak in rows:
        weighted = [features[i] / peak for i in chosen]
        for i in range(n):
            for j in range(n):
                matrix[i][j] += weighted[i] * weighted[j]
            matrix[i][n] += weighted[i]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(matrix[r][i]))
        if abs(matrix[pivot][i]) < 1e-30:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in range(n):
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [a - factor * b for a, b in zip(matrix[r], matrix[i], strict=True)]
    scalars = [0.0, 0.0, 0.0]
    for i, feature in enumerate(chosen):
        scalars[feature] = matrix[i][n] / matrix[i][i]
    return tuple(scalars)


@dataclass(slots=True)
class Correction:
    """How far measured peaks exceed predicted ones at the moment: a factor ≥ 1 that decays towards 1."""

    factor: float = 1.0
    decay: float = 0.98

    def observe(self, predicted: int, measured: int) -> None:
        """Take in one step. A worse one raises the factor at once; any other lets it decay."""
        seen = measured / predicted if predicted > 0 else 1.0
        self.factor = max(1.0, seen, 1.0 + (self.factor - 1.0) * self.decay)
