"""Grammars in the loop: random models write what a schema allows, in company, after faults, continued."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tests.support import tiny_models
from tests.support.engine_loop import EngineLoop
from tests.support.faults import Poisoned, raises

from penstock import wire
from penstock.engine.batch import Runner
from penstock.engine.scheduler import Preempt
from penstock.memory.ledger import Account
from penstock.text.grammar import json_rule

DENSE, HYBRID = "qwen3", "qwen3_5"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "bc", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
GRAMMAR = "start: " + json_rule(SCHEMA, "schema")
HOT = wire.Sampling(temperature=1.0, seed=11, logprobs=2)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.write_tokenizer(folder)
    return folder


@pytest.fixture(params=[HYBRID, DENSE], name="engine")
def _engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[EngineLoop]:
    engine = make(request.param, folder)
    yield engine
    close(engine)


def make(name: str, folder: Path, **options: Any) -> EngineLoop:
    runner = Runner(tiny_models.build(name))
    eos = [tiny_models.END_OF_TURN]
    return EngineLoop(runner, vocab_size=tiny_models.VOCAB, eos_ids=eos, folder=folder, **options)


def close(engine: EngineLoop) -> None:
    """Nothing is left of any grammar but the tokenizer that they share."""
    grammars = engine.loop.grammars
    shared = grammars._shared.size if grammars._shared else 0
    assert engine.accounts.ledger.balance(Account.GRAMMARS) == shared
    assert not grammars._matchers
    assert not grammars.compiling
    engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def text(tokens: list[int]) -> str:
    alphabet = tiny_models.byte_pieces()
    return b"".join(alphabet[token] for token in tokens if token < 256).decode("utf-8", "replace")


def check(tokens: list[int]) -> dict[str, Any]:
    """The answer, which is whole and of the schema."""
    value = json.loads(text(tokens))
    assert list(value) == SCHEMA["required"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 99
    assert value["kind"] in ("a", "bc", None)
    assert 1 <= len(value["tags"]) <= 3
    assert all(isinstance(tag, bool) for tag in value["tags"])
    return value  # type: ignore[no-any-return]


def turns(engine: EngineLoop, id_: int, count: int) -> None:
    """Until a sequence has some ids, whatever compiles in the meantime."""
    end = time.monotonic() + 60
    while len(engine.answers[id_].tokens) < count:
        assert time.monotonic() < end
        engine.turn()


@pytest.mark.parametrize("name", [DENSE, HYBRID, "mamba2", "gemma3_text"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_any_model_under_a_schema_writes_valid_json(name: str, temperature: float, folder: Path) -> None:
    engine = make(name, folder)
    ids = []
    for seed in range(4):
        sampling = wire.Sampling(temperature=temperature, seed=seed, top_k=40 * (seed % 2), top_p=0.95)
        ids.append(engine.submit(prompt(9 + seed, seed), sampling=sampling, grammar=GRAMMAR))
    engine.play(200_000)
    close(engine)
    answers = [engine.answers[id_] for id_ in ids]
    values = [check(answer.tokens) for answer in answers]
    assert all(answer.ended.reason == "stop" for answer in answers if answer.ended)
    assert len({json.dumps(value) for value in values}) > 1, "models that say the same would pass anything"


@pytest.mark.parametrize("pipelined", [True, False])
def test_rows_without_a_grammar_write_what_they_write_alone(pipelined: bool, folder: Path) -> None:
    penalised = wire.Sampling(temperature=0.8, seed=3, repetition_penalty=1.3, presence_penalty=0.5)
    jobs = [(prompt(30, 1), wire.Sampling(logprobs=1)), (prompt(70, 2), HOT), (prompt(5, 3), penalised)]
    expected = []
    for ids, sampling in jobs:
        engine = make(HYBRID, folder)
        id_ = engine.submit(ids, sampling=sampling, max_tokens=60)
        engine.play()
        expected.append(engine.answers[id_])
        close(engine)
    engine = make(HYBRID, folder, pipelined=pipelined)
    bound = engine.submit(prompt(12), sampling=HOT, grammar=GRAMMAR)
    turns(engine, bound, 1)
    free = [engine.submit(ids, sampling=sampling, max_tokens=60) for ids, sampling in jobs]
    engine.play(200_000)
    close(engine)
    check(engine.answers[bound].tokens)
    for id_, want in zip(free, expected, strict=True):
        assert engine.answers[id_].tokens == want.tokens
        assert engine.answers[id_].logprobs == pytest.approx(want.logprobs, abs=1e-4)


def whole(engine: EngineLoop, **fields: Any) -> list[int]:
    id_ = engine.submit(prompt(40), sampling=HOT, grammar=GRAMMAR, **fields)
    engine.play(200_000)
    return engine.answers[id_].tokens


def test_a_continuation_goes_on_inside_the_grammar(engine: EngineLoop) -> None:
    tokens = whole(engine)
    check(tokens)
    for cut in (1, len(tokens) // 2, len(tokens) - 1):
        assert tokens[:cut] + whole(engine, delivered=tokens[:cut]) == tokens
    assert whole(engine, delivered=tokens) == [], "and one that was complete ends at once"


def test_a_preempted_row_goes_on_inside_the_grammar(engine: EngineLoop) -> None:
    tokens = whole(engine)
    id_ = engine.submit(prompt(40), sampling=HOT, grammar=GRAMMAR)
    for count in (1, len(tokens) // 2):
        turns(engine, id_, count)
        engine.loop._read()
        engine.loop._apply(Preempt(engine.loop.sequences[id_]))
        assert engine.accounts.ledger.balance(Account.GRAMMARS) == engine.loop.grammars._shared.size  # type: ignore[union-attr]
        engine.accounts.departures += 2
    engine.play(200_000)
    assert engine.answers[id_].tokens == tokens


@pytest.mark.parametrize("at", [[3], [4, 9], [12]])
def test_after_an_error_of_mlx_a_row_goes_on_inside_the_grammar(engine: EngineLoop, at: list[int]) -> None:
    tokens = whole(engine)
    poisoned = Poisoned(engine.loop.runner, raises, at=at)
    engine.loop.runner = poisoned
    other = engine.submit(prompt(20, 4), max_tokens=40)
    assert whole(engine) == tokens
    assert poisoned.failed
    assert len(engine.answers[other].tokens) == 40


def test_the_end_of_turn_waits_until_the_grammar_accepts_it(engine: EngineLoop) -> None:
    """Whatever the model prefers: a number may go on, so it is the end of turn that ends it."""
    biased = wire.Sampling(logit_bias={tiny_models.END_OF_TURN: 1e4})
    integer = "start: " + json_rule({"type": "integer", "minimum": 100}, "schema")
    bound = engine.submit(prompt(9), sampling=biased, grammar=integer, min_tokens=50)
    free = engine.submit(prompt(9), sampling=biased)
    engine.play(200_000)
    tokens = engine.answers[bound].tokens
    assert tokens[-1] == tiny_models.END_OF_TURN
    assert int(text(tokens)) >= 100
    assert engine.answers[free].tokens == [tiny_models.END_OF_TURN]


def test_max_tokens_cuts_inside_a_grammar(engine: EngineLoop) -> None:
    id_ = engine.submit(prompt(9), sampling=HOT, grammar=GRAMMAR, max_tokens=5)
    engine.play(200_000)
    assert engine.answers[id_].ended.reason == "length"  # type: ignore[union-attr]
    assert len(engine.answers[id_].tokens) == 5


def test_a_grammar_that_fails_fails_its_request_alone(
    engine: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that do not compile, and one whose automaton grows too large while the answer is written."""
    exploding = {"type": "string", "pattern": "^((a|b)*a(a|b){60}c)+$"}
    good = engine.submit(prompt(9, 8), sampling=HOT, grammar=GRAMMAR)
    turns(engine, good, 1)
    monkeypatch.setitem(wire.GRAMMAR_LIMITS, "max_lexer_states", 150)
    bad = ["start: nothing", 'start: %json {"type": "foo"}', "start: " + json_rule(exploding, "schema")]
    free = engine.submit(prompt(9), max_tokens=400)
    longer = {tiny_models.byte_pieces().index(sign): -1e4 for sign in (b'"', b"c")}
    sampling = wire.Sampling(temperature=1.0, seed=11, logit_bias=longer)
    failing = [engine.submit(prompt(9, 7), sampling=sampling, grammar=grammar) for grammar in bad]
    engine.play(200_000)
    for id_ in failing:
        ended = engine.answers[id_].ended
        assert ended is not None
        assert (ended.reason, ended.kind) == ("error", "INVALID_FIELD")
        assert ended.message
        assert "grammar" in ended.message
    check(engine.answers[good].tokens)
    assert engine.answers[free].ended.reason in ("length", "stop")  # type: ignore[union-attr]


def test_a_grammar_that_compiles_for_ever_is_given_up(
    engine: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = engine.loop.grammars
    monkeypatch.setattr("penstock.engine.grammar.COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(grammars, "_load", lambda: time.sleep(1.0))
    id_ = engine.submit(prompt(9), grammar=GRAMMAR)
    engine.play(200_000)
    assert engine.answers[id_].ended.kind == "INVALID_FIELD"  # type: ignore[union-attr]


def test_a_request_that_leaves_while_its_grammar_compiles_leaves_nothing(engine: EngineLoop) -> None:
    id_ = engine.submit(prompt(9), grammar=GRAMMAR)
    engine.turn()
    engine.turn()
    engine.end(id_)
    engine.play()
    assert engine.answers[id_].ended.reason == "cut"  # type: ignore[union-attr]


def test_what_a_grammar_holds_is_under_lease_before_it_is_held(folder: Path) -> None:
    """A row with a grammar waits for room as any other, and the tokenizer's is asked for once."""
    engine = make(DENSE, folder, ceiling=64 << 20)
    first = engine.submit(prompt(9), sampling=HOT, grammar=GRAMMAR)
    ids = [first, *(engine.submit(prompt(9, n), sampling=HOT, grammar=GRAMMAR) for n in range(30))]
    most = 0
    while not all(engine.answers[id_].ended for id_ in ids):
        engine.turn()
        held = engine.accounts.ledger.balance(Account.GRAMMARS)
        most = max(most, held)
        assert engine.accounts.ledger.held <= 64 << 20
    engine.play()
    close(engine)
    one = engine.loop.grammars.host_bytes(GRAMMAR)
    assert 2 * one < most < 31 * one
    for id_ in ids:
        check(engine.answers[id_].tokens)


def test_a_batch_without_a_grammar_makes_no_mask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(DENSE, folder)
    draws = []
    draw = engine.loop.drawing.draw

    def seen(rows: Any, logits: mx.array, inputs: mx.array, masks: Any) -> Any:
        draws.append((engine.loop.in_flight, masks))
        return draw(rows, logits, inputs, masks)

    monkeypatch.setattr(engine.loop.drawing, "draw", seen)
    engine.submit(prompt(9), max_tokens=10)
    engine.play()
    close(engine)
    assert all(masks == [] for _, masks in draws)
    assert sum(flying is not None for flying, _ in draws) >= 8, "drawn before the step before was read"
