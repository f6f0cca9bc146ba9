"""Errors inside a step, also late ones: the guilty fail alone, nobody hears an id that should not be."""

from __future__ import annotations

import random
from collections.abc import Callable

import mlx.core as mx
import pytest
from tests.support import faults, tiny_models
from tests.support.engine_loop import EngineLoop

from penstock import wire
from penstock.engine.batch import Runner

HYBRID, DENSE = "qwen3_5", "qwen3"
POISON = 255
HOT = wire.Sampling(temperature=1.0, seed=3, logit_bias={POISON: -1000.0})


def make(name: str) -> EngineLoop:
    return EngineLoop(Runner(tiny_models.build(name)), vocab_size=tiny_models.VOCAB)


def prompt(length: int, seed: int, poisoned: int | None = None) -> list[int]:
    ids = random.Random(seed).choices(range(200), k=length)
    if poisoned is not None:
        ids[poisoned] = POISON
    return ids


def undisturbed(name: str, prompts: list[list[int]], most: int) -> list[list[int]]:
    engine = make(name)
    ids = [engine.submit(p, sampling=HOT, max_tokens=most) for p in prompts]
    engine.play()
    engine.close()
    return [engine.answers[id_].tokens for id_ in ids]


@pytest.mark.parametrize(("name", "how"), [(HYBRID, faults.late_error), (DENSE, faults.raises)])
def test_an_error_wherever_it_comes_changes_no_answer(name: str, how: Callable[[], mx.array]) -> None:
    """At each launch of a short session in turn: in prefill, in decode, between two decode steps."""
    prompts = [prompt(n, n) for n in (3, 70, 150)]
    expected = undisturbed(name, prompts, 8)
    for at in range(1, 11):
        engine = make(name)
        runner = engine.loop.runner = faults.Poisoned(engine.loop.runner, how, at=(at,))
        ids = [engine.submit(p, sampling=HOT, max_tokens=8) for p in prompts]
        engine.play()
        engine.close()
        assert runner.failed or runner.calls < at
        assert [engine.answers[id_].tokens for id_ in ids] == expected, at


@pytest.mark.parametrize(("how", "at", "bad"), [(faults.late_error, 5, 1), (faults.raises, 120, 2)])
def test_the_poisoned_among_eight_fail_each_alone(how: Callable[[], mx.array], at: int, bad: int) -> None:
    """In prefill, at the first chunk or the second; the innocents are on board at every error."""
    good = [prompt(n, n) for n in (3, 20, 40, 60, 90, 130)]
    expected = undisturbed(DENSE, good, 80)
    engine = make(DENSE)
    engine.loop.runner = faults.Poisoned(engine.loop.runner, how, POISON)
    ids = [engine.submit(p, sampling=HOT, max_tokens=80) for p in good]
    for _ in range(12):
        engine.turn()
    guilty = [engine.submit(prompt(140, 50 + i, at), max_tokens=80) for i in range(bad)]
    while not all(engine.answers[id_].ended for id_ in guilty):
        engine.turn()
        assert not any(engine.answers[id_].ended for id_ in ids)
    engine.play()
    engine.close()
    for id_ in guilty:
        ended = engine.answers[id_].ended
        assert ended is not None
        assert (ended.reason, ended.kind) == ("error", "INTERNAL")
        assert engine.answers[id_].tokens == []
    assert [engine.answers[id_].tokens for id_ in ids] == expected


@pytest.mark.parametrize("bad", [1, 2])
def test_the_poisoned_at_a_decode_step_of_the_full_batch_fail_each_alone(bad: int) -> None:
    good = [prompt(n, n) for n in (3, 20, 40, 60, 9, 13)]
    expected = undisturbed(HYBRID, good, 80)
    engine = make(HYBRID)
    ids = [engine.submit(p, sampling=HOT, max_tokens=80) for p in good]
    # The last id of a prompt is the first that a decode step computes.
    guilty = [engine.submit([*prompt(10 + i, 50 + i), POISON], max_tokens=80) for i in range(bad)]
    runner = engine.loop.runner = faults.Poisoned(engine.loop.runner, faults.late_error, POISON)
    while not all(engine.answers[id_].ended for id_ in guilty):
        engine.turn()
        assert not any(engine.answers[id_].ended for id_ in ids)
    engine.play()
    engine.close()
    assert max(runner.failed) > bad, "in company at first"
    assert runner.failed.count(1) >= bad, "alone at last"
    for id_ in guilty:
        assert engine.answers[id_].tokens == []
    assert [engine.answers[id_].tokens for id_ in ids] == expected


def test_rows_that_were_not_running_keep_what_was_computed() -> None:
    """Two long prompts in prefill; one is poisoned: the other's chunks are not computed twice."""
    engine = make(DENSE)
    runner = engine.loop.runner = faults.Poisoned(engine.loop.runner, faults.raises, POISON)
    computed: list[int] = []
    prefill = runner.prefill

    def counted(row: object, ids: list[int]) -> list[mx.array]:
        computed.append(len(ids))
        return prefill(row, ids)

    runner.prefill = counted  # type: ignore[method-assign]
    innocent = engine.submit(prompt(1000, 1), max_tokens=2)
    for _ in range(6):
        engine.turn()
    done = sum(computed)
    assert done > 256
    guilty = engine.submit(prompt(60, 2, 50), max_tokens=2)
    engine.play()
    engine.close()
    assert engine.answers[guilty].ended.reason == "error"  # type: ignore[union-attr]
    assert len(engine.answers[innocent].tokens) == 2
    assert sum(computed) == 999 + 2 * 59
