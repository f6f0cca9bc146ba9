"""Engines whose rows share prefixes, and what becomes of one that lends: for tests of who holds what then."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import pytest
from tests.support import faults, tiny_models
from tests.support.engine_loop import Answer, EngineLoop

from penstock import wire
from penstock.engine.batch import Runner
from penstock.engine.calibrate import costs_of
from penstock.engine.scheduler import Preempt
from penstock.engine.sequence import Sequence

NAMES = ["qwen3", "qwen3_5", "gemma3_text", "deepseek_v3"]
SAMPLING = wire.Sampling(temperature=0.0, logprobs=5)
TOLERANCE = 1e-4
MOST = 12
"""Ids of an answer."""


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(200), k=count)


@cache
def model(name: str) -> Any:
    """A hybrid with more than one plain layer: rows take a prefix over layer by layer."""
    if name != "qwen3_5":
        return tiny_models.build(name)
    return tiny_models.make(tiny_models.config_of(name, full_attention_interval=2), scale=2.0)


def make(name: str, cache_bytes: int | None = None) -> EngineLoop:
    runner = Runner(model(name))
    return EngineLoop(runner, vocab_size=tiny_models.VOCAB, cache_bytes=cache_bytes, chunk_longest=32)


@cache
def per_id(name: str) -> int:
    """Bytes of an id's keys and values."""
    return costs_of(Runner(model(name))).kv_per_token


def submit(engine: EngineLoop, prompt: list[int], most: int = MOST) -> int:
    borders = [at for at in (48, 100, len(prompt) - 2) if at < len(prompt)]
    return engine.submit(prompt, max_tokens=most, sampling=SAMPLING, borders=borders)


@cache
def fresh(name: str, prompt: tuple[int, ...], most: int = MOST) -> Answer:
    """The answer of an engine that caches nothing."""
    engine = make(name, cache_bytes=0)
    id_ = submit(engine, list(prompt), most)
    engine.play()
    engine.close()
    return engine.answers[id_]


def difference(one: Answer, two: Answer) -> float:
    """The largest of log-probabilities of the ids that both chose, up to where they part."""
    pairs = list(zip(one.tokens, two.tokens, strict=False))
    same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
    found = [abs(a - b) for a, b in zip(one.logprobs[:same], two.logprobs[:same], strict=True)]
    return max([*found, 0.0 if one.tokens == two.tokens else 1.0])


def sequence(engine: EngineLoop, id_: int) -> Sequence:
    return engine.loop.sequences[id_]


def until(engine: EngineLoop, done: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if done():
            return
        engine.turn()
    raise AssertionError("it does not come")


def quiet(engine: EngineLoop) -> None:
    """Nothing in flight, so that a measure can be applied by hand, as the loop does."""
    engine.loop._read()


def preempt(engine: EngineLoop, id_: int) -> None:
    quiet(engine)
    if id_ in engine.loop.sequences and sequence(engine, id_).row is not None:
        engine.loop._apply(Preempt(sequence(engine, id_)))
        engine.accounts.departures += 1  # somebody left, so that it may come back


def fail_next(engine: EngineLoop, how: Callable[[], mx.array]) -> None:
    """The next launch fails."""
    runner = engine.loop.runner
    if not isinstance(runner, faults.Poisoned):
        runner = engine.loop.runner = faults.Poisoned(runner, how)
    runner._how, runner._at = how, (runner.calls + 1,)


def use_short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 16 ids, and nothing there twice."""
    monkeypatch.setattr("penstock.cache.tree.SEGMENT", 16)
    monkeypatch.setattr("penstock.memory.costs.SEGMENT", 16)
    monkeypatch.setattr("penstock.cache.tree.SPARE", 0.0)


def fail_a_copy(at: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At the `at`-th wait of the store MLX tells an error, late. What it returns grows with each wait."""
    calls: list[int] = []
    synchronize = mx.synchronize

    def fails_later() -> None:
        calls.append(1)
        if len(calls) == at:
            mx.async_eval(faults.late_error())  # type: ignore[no-untyped-call]
        synchronize()

    monkeypatch.setattr("penstock.cache.store.mx.synchronize", fails_later)
    return calls


SHARED = ids(100, 1)
PARENT, CHILD, THIRD = SHARED + ids(40, 2), SHARED + ids(30, 3), SHARED[:61] + ids(30, 4)
NEXT = PARENT + ids(25, 6)


def lent_once(name: str) -> tuple[EngineLoop, int]:
    """A row that began with a hit and decodes: what it found is borrowed from it."""
    engine = make(name)
    submit(engine, SHARED + ids(8, 5))
    engine.play()
    parent = submit(engine, PARENT, most=60)
    until(engine, lambda: len(engine.answers[parent].tokens) > 3)
    assert engine.answers[parent].cached >= 98
    assert engine.cache.tree._held_twice() == (0, 0)
    return engine, parent


def ends(engine: EngineLoop, parent: int) -> None:
    engine.end(parent, keep=len(PARENT) + len(engine.answers[parent].tokens))
    until(engine, lambda: parent not in engine.loop.sequences and not engine.loop.leaving)


def tight(engine: EngineLoop) -> None:
    """From now on there is never room for more than one layer of a row, or for a segment cut in two."""
    costs = engine.accounts.costs
    most = 200 * costs.layer_per_token + costs.rounding // 2
    engine.cache._room = lambda size: size <= most  # type: ignore[method-assign]


def ends_in_little_room(engine: EngineLoop, parent: int) -> None:
    tight(engine)
    ends(engine, parent)
    assert not engine.cache._adopted
