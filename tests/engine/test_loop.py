"""The loop over real tiny models: what a client gets does not depend on company, order or faults."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest
from tests.support import tiny_models
from tests.support.engine_loop import Answer, EngineLoop

from penstock import wire
from penstock.engine import pace
from penstock.engine.batch import Runner
from penstock.memory.ledger import Account

HYBRID, DENSE = "qwen3_5", "qwen3"


@pytest.fixture(params=[HYBRID, DENSE], name="engine")
def _engine(request: pytest.FixtureRequest) -> Iterator[EngineLoop]:
    engine = make(request.param)
    yield engine
    engine.close()


def make(name: str, **options: object) -> EngineLoop:
    runner = Runner(tiny_models.build(name))
    assert runner.mode == "ragged"
    return EngineLoop(runner, vocab_size=tiny_models.VOCAB, **options)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def alone(name: str, ids: list[int], **fields: object) -> Answer:
    engine = make(name, pipelined=False)
    id_ = engine.submit(ids, **fields)  # type: ignore[arg-type]
    engine.play()
    engine.close()
    return engine.answers[id_]


HOT = wire.Sampling(temperature=1.0, seed=11, logprobs=3)


@pytest.mark.parametrize("name", [HYBRID, DENSE])
def test_greedy_and_seeded_answers_are_the_same_alone_and_in_company(name: str) -> None:
    lengths = [1, 5, 130, 40, 300, 17]
    jobs = [(prompt(n, n), HOT if n % 2 else wire.Sampling(logprobs=1), 12 + n % 7) for n in lengths]
    expected = [alone(name, ids, sampling=s, max_tokens=m) for ids, s, m in jobs]
    engine = make(name)
    got = []
    for ids, sampling, most in jobs:
        got.append(engine.submit(ids, sampling=sampling, max_tokens=most))
        for _ in range(3):
            engine.turn()
    engine.play()
    engine.close()
    for id_, want in zip(got, expected, strict=True):
        answer = engine.answers[id_]
        assert answer.tokens == want.tokens
        assert answer.logprobs == pytest.approx(want.logprobs, abs=1e-4)
        assert answer.ended is not None
        assert answer.ended.reason == "length"


def test_a_greedy_request_that_joins_hot_ones_stays_greedy() -> None:
    ids = prompt(20, 5)
    expected = alone(HYBRID, ids, max_tokens=20).tokens
    engine = make(HYBRID)
    for seed in range(4):
        engine.submit(prompt(9, seed), sampling=wire.Sampling(temperature=2.0, seed=seed), max_tokens=40)
    for _ in range(4):
        engine.turn()
    greedy = engine.submit(ids, max_tokens=20)
    engine.play()
    engine.close()
    assert engine.answers[greedy].tokens == expected
    assert expected == tiny_models.greedy(tiny_models.build(HYBRID), mx.array(ids), 20)


def test_a_continuation_draws_what_would_have_come(engine: EngineLoop) -> None:
    whole = engine.submit(prompt(30), sampling=HOT, max_tokens=16)
    engine.play()
    tokens = engine.answers[whole].tokens
    for cut in (1, 7, 15):
        rest = engine.submit(prompt(30), sampling=HOT, max_tokens=16, delivered=tokens[:cut])
        engine.play()
        assert engine.answers[rest].tokens == tokens[cut:]
    done = engine.submit(prompt(30), sampling=HOT, max_tokens=16, delivered=tokens)
    engine.play()
    assert engine.answers[done].tokens == []
    assert engine.answers[done].ended.reason == "length"  # type: ignore[union-attr]


def test_ends_at_the_end_of_turn_unless_told_to_ignore_it(engine: EngineLoop) -> None:
    first = engine.submit(prompt(12), max_tokens=30)
    engine.play()
    tokens = engine.answers[first].tokens
    eos = tokens[9]
    at = tokens.index(eos)
    engine.loop.eos_ids = engine.loop.drawing.eos_ids = frozenset([eos])
    stopped = engine.submit(prompt(12), max_tokens=30)
    ignored = engine.submit(prompt(12), max_tokens=30, ignore_eos=True)
    longer = engine.submit(prompt(12), max_tokens=30, min_tokens=at + 3)
    engine.play()
    assert engine.answers[stopped].tokens == tokens[: at + 1]
    assert engine.answers[stopped].ended.reason == "stop"  # type: ignore[union-attr]
    assert engine.answers[ignored].tokens == tokens
    assert eos not in engine.answers[longer].tokens[: at + 3]
    assert len(engine.answers[longer].tokens) >= at + 3


def test_the_context_ends_an_answer_without_a_limit() -> None:
    engine = make(DENSE, context_length=64)
    id_ = engine.submit(prompt(40))
    full = engine.submit(prompt(64))
    engine.play()
    engine.close()
    assert len(engine.answers[id_].tokens) == 24
    assert engine.answers[full].tokens == []
    for answer in engine.answers.values():
        assert answer.ended is not None
        assert answer.ended.reason == "length"


def test_an_end_from_the_front_takes_effect_at_the_next_turn(engine: EngineLoop) -> None:
    """Queued, in prefill, and decoding; the others' answers do not change."""
    engine.loop.facts = replace(
        engine.loop.facts, decode_concurrency=2, prompt_concurrency=1, chunk_longest=16
    )
    decoding = engine.submit(prompt(4), max_tokens=1000)
    for _ in range(4):
        engine.turn()
    prefilling = engine.submit(prompt(2000), max_tokens=5)
    queued = engine.submit(prompt(3), max_tokens=5)
    for _ in range(4):
        engine.turn()
    assert engine.loop.sequences[prefilling].row is not None
    assert engine.loop.sequences[queued].row is None
    for id_ in (decoding, prefilling, queued):
        engine.end(id_, keep=7)
        engine.end(id_, keep=3)  # a second end of the same id is void
    engine.turn()
    engine.turn()
    assert not engine.loop.sequences
    computed = [engine.answers[id_].ended.computed for id_ in (decoding, prefilling, queued)]  # type: ignore[union-attr]
    assert computed == [7, 7, 0]
    engine.play()


def test_what_is_cached_and_what_is_pooled_go_when_they_are_asked_for() -> None:
    engine = make(HYBRID, cache_bytes=None)
    held = engine.accounts.ledger.balance
    engine.submit(prompt(300), max_tokens=20)
    engine.play()
    cached = held(Account.CACHED)
    assert cached > 0
    assert held(Account.POOL) > 0
    engine.channel.inbox.append(wire.Release(cache=False))
    engine.turn()
    assert (held(Account.CACHED), held(Account.POOL)) == (cached, 0)
    engine.channel.inbox.append(wire.Release(cache=True))
    engine.turn()
    assert held(Account.CACHED) == 0
    again = engine.submit(prompt(300), max_tokens=20)
    engine.play()
    assert engine.answers[again].cached == 0
    assert held(Account.POOL) > 0, "and it comes back with the next request"
    engine.close()


def test_prefill_progress_reaches_the_whole_prompt(engine: EngineLoop) -> None:
    id_ = engine.submit(prompt(200), max_tokens=1)
    engine.play()
    assert engine.answers[id_].prefilled == [64, 128, 192, 199]


class Blocking:
    """A runner whose prefill computes while it is launched, as MLX's CPU back end does."""

    def __init__(self, runner: Runner, seconds: float) -> None:
        self.runner, self.seconds = runner, seconds

    def __getattr__(self, name: str) -> object:
        return getattr(self.runner, name)

    def prefill(self, row: object, ids: object) -> object:
        time.sleep(self.seconds)
        return self.runner.prefill(row, ids)  # type: ignore[arg-type]


def test_the_pace_of_a_prefill_counts_what_its_launch_takes(engine: EngineLoop) -> None:
    engine.loop.runner = Blocking(engine.loop.runner, 0.2)
    engine.submit(prompt(300), max_tokens=1)
    engine.play()
    pace = engine.loop.facts.seconds_per_prefill_id
    assert pace is not None
    assert pace >= 0.2 / 64


def test_the_pace_is_the_same_beside_a_stream(engine: EngineLoop) -> None:
    """A step that was read after a chunk's launch would have hidden most of the chunk's time."""
    engine.loop.runner = Blocking(engine.loop.runner, 0.1)
    engine.submit(prompt(40), max_tokens=60)
    paces = []
    for seed in range(4):
        engine.submit(prompt(50, seed + 2), max_tokens=3)
        for _ in range(8):
            engine.turn()
        assert engine.loop.facts.seconds_per_prefill_id is not None
        paces.append(engine.loop.facts.seconds_per_prefill_id)
    engine.play()
    assert min(paces) >= 0.1 / 50


class Witness:
    """A runner that looks how much of a stream has been told when a chunk is launched."""

    def __init__(self, engine: EngineLoop, stream: int) -> None:
        self.runner, self.engine, self.stream = engine.loop.runner, engine, stream
        self.seen: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.runner, name)

    def prefill(self, row: object, ids: object) -> object:
        sequence = self.engine.loop.sequences.get(self.stream)
        if sequence is not None and sequence.launched >= sequence.prompt_length:
            told = sum(
                len(r.tokens)
                for message in self.engine.channel.sent
                if isinstance(message, wire.Step)
                for r in message.rows
                if r.id == self.stream
            )
            told += len(self.engine.answers[self.stream].tokens)
            self.seen.append((told, sequence.launched + 1 - sequence.prompt_length))
        return self.runner.prefill(row, ids)  # type: ignore[arg-type]


def test_what_a_stream_has_drawn_is_told_before_a_chunk_is_launched(engine: EngineLoop) -> None:
    stream = engine.submit(prompt(20), sampling=HOT, max_tokens=100)
    for _ in range(6):
        engine.turn()
    witness = Witness(engine, stream)
    engine.loop.runner = witness  # type: ignore[assignment]
    engine.submit(prompt(500, 5), max_tokens=3)
    engine.play()
    assert len(witness.seen) >= 7
    assert all(told == drawn for told, drawn in witness.seen), witness.seen


class Faulty:
    """A runner whose `decode` raises at chosen calls, as MLX raises at launch."""

    def __init__(self, runner: Runner, at: set[int]) -> None:
        self.runner, self.at, self.calls = runner, at, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.runner, name)

    def decode(self, rows: object, inputs: mx.array) -> mx.array:
        self.calls += 1
        if self.calls in self.at:
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        return self.runner.decode(rows, inputs)  # type: ignore[arg-type]


def test_after_an_error_rows_are_computed_again_and_answers_are_whole() -> None:
    expected = [alone(HYBRID, prompt(n, n), sampling=HOT, max_tokens=20).tokens for n in (3, 50, 120)]
    engine = make(HYBRID)
    engine.loop.runner = Faulty(engine.loop.runner, {6, 15})
    ids = [engine.submit(prompt(n, n), sampling=HOT, max_tokens=20) for n in (3, 50, 120)]
    engine.play()
    engine.close()
    assert [engine.answers[id_].tokens for id_ in ids] == expected


@pytest.mark.parametrize("model", [DENSE, HYBRID, "gemma3_text"])
def test_an_error_between_two_layers_of_a_chunk_leaves_no_trace(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have written the chunk by then and others not."""
    expected = [alone(model, prompt(n, n), max_tokens=10).tokens for n in (90, 200)]
    engine, mark, marks = make(model), pace.mark, itertools.count()

    def fails(*written: mx.array) -> None:
        if next(marks) in (6, 17, 30):
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        mark(*written)

    monkeypatch.setattr(pace, "mark", fails)
    ids = [engine.submit(prompt(n, n), max_tokens=10) for n in (90, 200)]
    engine.play()
    engine.close()
    assert engine.loop.counts["errors"] == 3
    assert [engine.answers[id_].tokens for id_ in ids] == expected


def test_errors_that_hit_whoever_runs_cost_nobody_the_answer() -> None:
    """Three in a row, the third while rows run one at a time: accidents, not one row's doing."""
    expected = [alone(DENSE, prompt(n), max_tokens=20).tokens for n in (3, 5, 9)]
    engine = make(DENSE)
    engine.loop.runner = Faulty(engine.loop.runner, {3, 4})
    ids = [engine.submit(prompt(n), max_tokens=20) for n in (3, 5, 9)]
    engine.play()
    engine.close()
    assert [engine.answers[id_].tokens for id_ in ids] == expected


def test_a_lone_row_that_fails_twice_at_one_place_fails_and_the_next_is_served() -> None:
    engine = make(DENSE)
    engine.loop.runner = Faulty(engine.loop.runner, {3, 4})
    id_ = engine.submit(prompt(3), max_tokens=20)
    engine.play()
    ended = engine.answers[id_].ended
    assert ended is not None
    assert (ended.reason, ended.kind) == ("error", "OUT_OF_MEMORY")
    assert engine.loop.counts["out_of_memory"] == 2
    after = engine.submit(prompt(8), max_tokens=5)
    engine.play()
    engine.close()
    assert len(engine.answers[after].tokens) == 5
