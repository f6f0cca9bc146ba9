"""The prompt cache through the loop: what hits, what is computed again, and whose bytes are whose."""

from __future__ import annotations

import random
from collections.abc import Iterator

import mlx.core as mx
import pytest
from tests.support import tiny_models
from tests.support.engine_loop import Answer, EngineLoop

from penstock import wire
from penstock.cache.nodes import below
from penstock.engine.batch import Runner
from penstock.memory.ledger import Account

NAMES = ["qwen3", "qwen3_5", "gemma3_text", "deepseek_v3"]
SAMPLING = wire.Sampling(temperature=0.0, logprobs=1)
"""Greedy: draws at a temperature hardly depend on what a tiny model has read."""


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def make(name: str, **options: object) -> EngineLoop:
    runner = Runner(tiny_models.build(name))
    options = {"cache_bytes": None, **options}
    return EngineLoop(runner, vocab_size=tiny_models.VOCAB, **options)  # type: ignore[arg-type]


@pytest.fixture(params=NAMES, name="engine")
def _engine(request: pytest.FixtureRequest) -> Iterator[EngineLoop]:
    engine = make(request.param)
    yield engine
    engine.close()


def ask(engine: EngineLoop, prompt: list[int], **fields: object) -> tuple[list[int], int]:
    """The answer, and how many of the prompt's ids came from the cache."""
    id_ = engine.submit(prompt, max_tokens=6, sampling=SAMPLING, **fields)  # type: ignore[arg-type]
    engine.play()
    answer = engine.answers[id_]
    return answer.tokens, answer.cached


def uncached(name: str, prompt: list[int]) -> list[int]:
    return fresh(name, prompt).tokens


def fresh(name: str, prompt: list[int]) -> Answer:
    """The answer of an engine that has cached nothing."""
    engine = make(name, cache_bytes=0)
    ask(engine, prompt)
    engine.close()
    return engine.answers[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_that_grows_computes_only_what_is_new(name: str) -> None:
    engine = make(name)
    prompt = ids(700, 1)
    for turn in range(4):
        border = len(prompt) - 3
        tokens, cached = ask(engine, prompt, borders=[5, border])
        assert tokens == uncached(name, prompt), f"turn {turn}"
        assert len(prompt) - cached <= (700 if turn == 0 else 60 + 64)
        prompt = prompt + tokens + ids(60, 10 + turn)
    engine.close()


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_a_chat_that_fills_most_of_the_memory_computes_only_what_is_new(name: str) -> None:
    """Its prefix and a row for its next turn are not there together: the one becomes the other."""
    engine = make(name)
    prompt = ids(3_000, 1)
    for turn in range(4):
        costs = engine.accounts.costs
        row = costs.row(len(prompt) + 6) + costs.states
        engine.accounts.clear_pool()
        engine.cache.set_budget(row + max(costs.taking(len(prompt) + 6), costs.kv_per_token * 400))
        tokens, cached = ask(engine, prompt)
        assert tokens == uncached(name, prompt), f"turn {turn}"
        assert len(prompt) - cached <= (3_000 if turn == 0 else 61)
        prompt = prompt + tokens + ids(60, 10 + turn)
    assert engine.loop.counts["taken_over"] == 3
    engine.close()


def test_the_same_prompt_again_hits_up_to_its_last_id(engine: EngineLoop) -> None:
    prompt = ids(300, 2)
    first, cached = ask(engine, prompt, borders=[5, 290])
    assert cached == 0
    second, cached = ask(engine, prompt, borders=[5, 290])
    assert second == first
    assert cached >= 290


def test_prompts_that_part_share_what_they_have_in_common(engine: EngineLoop) -> None:
    shared = ids(600, 3)
    one, two, three = (shared + ids(40, seed) for seed in (4, 5, 6))
    ask(engine, one, borders=[5, 600])
    for branch in (two, three):
        _, cached = ask(engine, branch, borders=[5, 600])
        assert cached >= 600 - 1
    held = engine.cache.tree.tokens
    assert held <= 600 + 3 * 48


def test_anchors_are_where_others_part_and_no_answers_end() -> None:
    engine = make("qwen3_5")
    prompt = ids(400, 40)
    tokens, _ = ask(engine, prompt, borders=[100, 250, 390], turn=250)
    nodes = [node for root in engine.cache.tree._roots.values() for node in below(root)]
    kept = {position: kept.anchor for node in nodes for position, kept in node.checkpoints.items()}
    assert {position for position, anchor in kept.items() if anchor} == {100, 250}
    assert max(kept) == 400 + len(tokens) - 1
    engine.close()


def test_another_namespace_sees_nothing(engine: EngineLoop) -> None:
    prompt = ids(200, 7)
    ask(engine, prompt, borders=[5, 190], namespace="a")
    assert ask(engine, prompt, borders=[5, 190], namespace="b")[1] == 0
    assert ask(engine, prompt, borders=[5, 190], namespace="a")[1] >= 190


def test_a_cancelled_prefill_is_resumed_by_the_same_request(engine: EngineLoop) -> None:
    prompt = ids(2000, 8)
    id_ = engine.submit(prompt, max_tokens=5)
    for _ in range(12):
        engine.turn()
    done = engine.loop.sequences[id_].computed
    assert 300 < done < 1900
    engine.end(id_)
    engine.play()
    again = engine.submit(prompt, max_tokens=5)
    engine.play()
    assert engine.answers[again].cached >= done - 64


def test_a_sub_agent_that_starts_while_its_parent_decodes_hits_its_prefix() -> None:
    for name in ("qwen3", "qwen3_5"):
        engine = make(name)
        prompt = ids(500, 9)
        parent = engine.submit(prompt, max_tokens=200, borders=[5, 480])
        for _ in range(30):
            engine.turn()
        assert len(engine.answers[parent].tokens) > 5
        child = engine.submit(prompt[:480] + ids(30, 10), max_tokens=5, borders=[5, 480])
        engine.play()
        assert engine.answers[child].cached >= 480
        engine.close()


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3"])
def test_stored_bytes_are_each_tokens_once(name: str) -> None:
    """Windows and latent keys; the others, in `test_cache_pressure`."""
    engine = make(name)
    shared = ids(1500, 11)
    unique = len(shared)
    for seed in range(4):
        tail = ids(100, 20 + seed)
        ask(engine, shared + tail, borders=[5, 1500])
        unique += len(tail) + 6
    tree = engine.cache.tree
    per_token = engine.accounts.costs.kv_per_token
    nodes = [node for root in tree._roots.values() for node in below(root)]
    states = sum(kept.size for node in nodes for kept in node.checkpoints.values())
    assert tree.tokens <= unique
    assert tree.bytes - states <= 1.10 * unique * per_token
    assert engine.accounts.ledger.balance(Account.CACHED) == tree.bytes
    engine.close()


def test_preemption_moves_what_was_computed_and_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.engine.sequence.FIRST_ROOM", 64)
    name = "qwen3"
    expected = [uncached_answer(name, seed) for seed in range(2)]
    probe = make(name)
    costs = probe.accounts.costs
    per_token = costs.kv_per_token
    probe.close()
    engine = make(name, ceiling=450 * per_token + 2 * costs.rounding)
    grown = []
    preempt = engine.cache.preempt

    def watched(sequence: object) -> None:
        assert engine.accounts.ledger.room < 164 * per_token, "there is room for a copy"
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        preempt(sequence)  # type: ignore[arg-type]
        grown.append((mx.get_peak_memory() - before, mx.get_active_memory() - before))

    engine.cache.preempt = watched  # type: ignore[method-assign, assignment]
    asked = [engine.submit(ids(100, seed), max_tokens=150, sampling=SAMPLING) for seed in range(2)]
    engine.play(turns=20_000)
    assert grown
    assert all(peak <= 0 and now <= 0 for peak, now in grown), "bytes were allocated"
    assert [engine.answers[id_].tokens for id_ in asked] == expected
    engine.close()


def uncached_answer(name: str, seed: int) -> list[int]:
    engine = make(name, cache_bytes=0)
    id_ = engine.submit(ids(100, seed), max_tokens=150, sampling=SAMPLING)
    engine.play(turns=20_000)
    engine.close()
    return engine.answers[id_].tokens


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3_text"])
def test_after_a_stop_string_the_next_turn_goes_on_in_the_answer(name: str) -> None:
    """The engine has gone on when the front finds the string; another row decodes beside it all the time."""
    engine = make(name)
    other = engine.submit(ids(150, 30), max_tokens=100, sampling=SAMPLING)
    prompts = [ids(190, 31) + ids(10, at) for at in (0, 1)]
    asked = [
        engine.submit(prompt, max_tokens=90, stops=at > 0, sampling=SAMPLING, borders=[5, 195])
        for at, prompt in enumerate(prompts)
    ]
    while any(len(engine.answers[id_].tokens) < 75 for id_ in asked):
        engine.turn()
    for id_, prompt in zip(asked, prompts, strict=True):
        engine.end(id_, keep=len(prompt) + 72)
    cached = []
    for id_, prompt in zip(asked, prompts, strict=True):
        said = engine.answers[id_].tokens[:66]  # the last 6 of 72 are the string's
        later = prompt + said + ids(30, 32)
        _, hit = ask(engine, later, borders=[5, 280])
        expected = fresh(name, later)
        answer = engine.answers[max(engine.answers)]
        assert answer.tokens == expected.tokens
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        cached.append(hit - len(prompt))
    assert cached[0] <= 0, "the control: a row that no stop string was to end"
    assert 66 - cached[1] <= 32
    assert engine.answers[other].ended is not None
    assert not engine.cache._passing.size
    engine.close()


def test_states_kept_for_a_stop_string_give_way_and_are_in_the_books() -> None:
    engine = make("qwen3_5")
    asked = engine.submit(ids(50, 33), max_tokens=100, stops=True, sampling=SAMPLING)
    while len(engine.answers[asked].tokens) < 60:
        engine.turn()
    held = engine.accounts.ledger.balance(Account.STATES)
    assert 2 * engine.accounts.costs.states <= held <= 4 * engine.accounts.costs.fixed
    before = engine.cache.evictable
    engine.cache.evict(1)
    assert engine.accounts.ledger.balance(Account.STATES) == 0
    assert engine.cache.evictable <= before - held
    engine.play()
    engine.close()


def test_an_end_is_not_lost_where_the_cache_meets_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a step in flight may come up while a stop string's path is brought in line."""
    engine = make("qwen3_5")
    asked = engine.submit(ids(40, 1), max_tokens=2_000, stops=True, sampling=SAMPLING)
    while len(engine.answers[asked].tokens) < 30:
        engine.turn()
    extend, errors = engine.cache._extend, []

    def fails_once(sequence: object) -> None:
        if not errors:
            errors.append(1)
            raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")
        extend(sequence)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.cache, "_extend", fails_once)
    engine.end(asked, keep=60)
    engine.play(turns=20)
    assert errors
    assert engine.answers[asked].ended is not None
    assert not engine.loop.sequences
    engine.close()
