"""The memory bound under storms. The long ones are `make test-storm`; short ones run with the rest."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
from tests.storm.harness import SHAPES, Record, Storm

from penstock.memory.predict import Scalars, Transient


def show(name: str, record: Record) -> None:
    print(f"\n{name}: " + "\n  ".join(record.lines()))


def is_tight(record: Record) -> None:
    """A storm that never came near the bound would show nothing."""
    assert record.largest_share >= 0.2
    assert record.longest_context >= 8_000
    assert len(record.chunk_lengths) >= 50
    for kind in ("shortened", "waits", "preempt"):
        assert record.counts[kind] >= 20, kind


@pytest.mark.storm
@pytest.mark.parametrize("name", SHAPES)
def test_no_step_passes_the_budget_it_was_planned_under(name: str) -> None:
    record = Storm(name, share=1.15, cache=True).run(2_000)
    show(name, record)
    is_tight(record)


@pytest.mark.storm
@pytest.mark.parametrize("name", SHAPES)
def test_no_step_holds_more_than_was_predicted_for_it(name: str) -> None:
    record = Storm(name, seed=1, share=1.15, pipelined=False).run(2_000)
    show(name, record)
    is_tight(record)
    assert record.worst() <= 1.0
    assert record.median_of_big_chunks() >= 0.75


@pytest.mark.parametrize("pipelined", [True, False])
def test_a_short_storm_over_a_hybrid(pipelined: bool) -> None:
    record = Storm("qwen3_5", seed=2, share=1.1, pipelined=pipelined, cache=pipelined, longest=256).run(45)
    show("qwen3_5", record)
    assert record.largest_share >= 0.2
    assert pipelined or record.worst() <= 1.0


@pytest.mark.storm
def test_a_constant_predictor_fails() -> None:
    """The positive control of the medians: the worst of all, predicted for everything, wastes most of it."""
    real = Storm("qwen3_5", pipelined=False)
    most = real.transient.prefill(256, 8_192)
    constant = Transient(Scalars(most, 0, 0), Scalars(most, 0, 0))
    record = Storm("qwen3_5", share=2.5, pipelined=False, transient=constant, longest=256).run(150)
    assert record.median_of_big_chunks() < 0.75


@pytest.mark.storm
def test_half_the_scores_fails() -> None:
    """The positive control of the bound: a predictor that forgets a part is found out."""
    real = Storm("qwen3_5", pipelined=False)
    curve = real.transient.chunk
    forgetful = replace(real.transient, chunk=replace(curve, per_score=curve.per_score / 2, hidden=0.0))  # type: ignore[type-var,attr-defined]
    storm = Storm("qwen3_5", seed=1, share=1.15, pipelined=False, transient=forgetful)
    storm.bound = 10.0
    assert storm.run(150).worst() > 1.0
    assert storm.record.tightest > 1.0


@pytest.mark.storm
@pytest.mark.parametrize("name", SHAPES)
def test_the_budget_is_in_use_while_requests_wait(name: str) -> None:
    """Equal requests, far more than fit: what is left over is less than one more of them."""
    storm = Storm(name, seed=3, share=1.5)
    storm.engine.loop.facts = replace(storm.engine.loop.facts, decode_concurrency=64)
    for _ in range(40):
        storm.engine.submit([storm.random.randrange(1, 2_000) for _ in range(900)], max_tokens=100)
    storm.engine.play()
    storm.engine.close()
    show(name, storm.record)
    assert len(storm.record.in_use) >= 50
    assert statistics.median(storm.record.in_use) >= 0.85
