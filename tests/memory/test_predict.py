"""The predictor on made-up machines whose truth is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.predict import MARGIN, Correction, Sample, Scalars, Transient, fit

GRID = [((256, 0),), ((1024, 0),), ((256, 8192),), ((1024, 8192),), ((1, 100),) * 4]


def samples(base: float, per_id: float, per_score: float) -> list[Sample]:
    truth = Scalars(base, per_id, per_score)
    return [Sample(chunks, truth.peak(chunks)) for chunks in GRID]


@given(st.floats(0, 1e8), st.floats(0, 1e6), st.floats(0, 1e3))
def test_finds_the_truth_behind_exact_samples(base: float, per_id: float, per_score: float) -> None:
    measured = samples(base, per_id, per_score)
    fitted = fit(measured)
    for sample in measured:
        assert sample.peak <= fitted.peak(sample.chunks) <= sample.peak * 1.02 + 64


@given(st.lists(st.floats(0.7, 1.3), min_size=len(GRID), max_size=len(GRID)))
def test_no_measured_step_exceeds_its_prediction(noise: list[float]) -> None:
    measured = [
        Sample(s.chunks, int(s.peak * n)) for s, n in zip(samples(1e6, 2e4, 64.0), noise, strict=True)
    ]
    fitted = fit(measured)
    assert all(s.peak <= fitted.peak(s.chunks) for s in measured)


def test_scores_are_told_from_activations() -> None:
    """The term that killed the reported server: 16 heads × 2 bytes a score, unfused."""
    fitted = fit(samples(2e7, 3e5, 32.0))
    assert fitted.per_score == pytest.approx(32.0, rel=0.01)
    assert fitted.peak([(2048, 64_000)]) > 4.2e9
    flat = fit(samples(2e7, 3e5, 0.0))
    assert flat.peak([(2048, 64_000)]) < 1e9


@given(st.integers(0, 10**10), st.integers(0, 65_536))
def test_the_longest_chunk_fits_and_the_next_does_not(room: int, context: int) -> None:
    transient = Transient(Scalars(1e6, 2e5, 32.0), Scalars(0, 0, 0))
    assert transient.prefill(100, 0) >= MARGIN * transient.chunk.peak([(100, 0)])
    longest = transient.longest_chunk(room, context, 2048)
    assert longest == 0 or transient.prefill(longest, context) <= room
    assert longest == 2048 or transient.prefill(longest + 1, context) > room


def test_the_correction_rises_at_once_and_decays() -> None:
    correction = Correction()
    correction.observe(100, 150)
    assert correction.factor == 1.5
    for _ in range(500):
        correction.observe(100, 90)
    assert correction.factor < 1.001
