"""Predicts what a step holds beyond its rows while it runs. Pure arithmetic over a few fitted scalars.

The transient peak of a prefill chunk of c ids on top of k computed ones is

    base + per_id · c + per_score · c · (k + c)

`per_id` stands for activations, experts and the gated-delta states of chunked prefill, which grow with the
chunk alone; `per_score` for attention scores where no fused kernel runs (query heads × item size, one layer
at a time); `base` for what is there in any step. A decode step of rows with lengths k1…kB is the same sum
with c = 1 for each row, and scalars of its own: it has logits and draws, and other kernels.

`fit` finds the scalars from measured steps, so that no measured step exceeds its prediction. `Correction`
follows what is measured later: it rises at once and falls by decay, never a lasting maximum, and it shapes
chunks and margins, never admission.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

MARGIN = 1.15
"""What the ledger holds above the fitted peak: allocation is rounded up to pages and size classes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step: chunk lengths with the ids computed before them, and its peak in bytes."""

    chunks: tuple[tuple[int, int], ...]
    peak: int


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
class Transient:
    """The predictor of a model on a device: a prefill chunk's scalars and a decode step's."""

    chunk: Scalars
    step: Scalars

    def prefill(self, length: int, context: int) -> int:
        """Peak in bytes of a prefill chunk of `length` ids after `context` computed ones, with margin."""
        return math.ceil(MARGIN * self.chunk.peak([(length, context)]))

    def decode(self, lengths: Iterable[int]) -> int:
        """Peak in bytes of a decode step over rows of these lengths, with margin."""
        return math.ceil(MARGIN * self.step.peak([(1, length) for length in lengths]))

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
