"""`plan` tells the truth: what it says without loading is what an engine finds, and what it then does."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from tests.support import model_files, scaled_models
from tests.support.engine_loop import EngineLoop

from penstock.engine import calibrate, device, loader, profile
from penstock.engine.batch import Runner
from penstock.engine.describe import Question, describe
from penstock.memory import estimate
from penstock.memory.costs import Fit
from penstock.memory.predict import Transient

MB = 1_000_000
CEILINGS = {"qwen3": 45 * MB, "qwen3_5": 60 * MB, "qwen3_moe": 70 * MB}
"""Dense, hybrid with head_dim 256, mixture of experts; each in too little memory for its context."""
MODELS = tuple(CEILINGS)


@pytest.fixture(autouse=True, scope="module")
def nothing_pooled() -> None:
    mx.set_cache_limit(0)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: model_files.write(root / name, scaled_models.config_of(name, max_position_embeddings=65_536))
        for name in MODELS
    }


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def question(directory: Path, **changes: object) -> Question:
    fields = {
        "model_path": str(directory),
        "ceiling": CEILINGS.get(directory.name, 0),
        "backend": device.backend(),
        "here": True,
        "decode_concurrency": 32,
        "prefill_step_size": 512,
    }
    return Question(**{**fields, **changes})


def engine(directory: Path) -> tuple[Runner, loader.Loaded, Transient]:
    """What an engine does at its start, and its profile stored."""
    loaded = loader.load(directory)
    runner = Runner(loaded.model)
    room = CEILINGS[directory.name] - loaded.facts.weights_bytes
    measured = calibrate.calibrate(
        runner, loaded.facts.vocab_size, room=room, context_length=loaded.facts.context_length, longest=512
    )
    profile.save(profile.fingerprint(loaded.config, runner.mode, True, 512, room), measured)
    return runner, loaded, measured


def sequence_of(length: int) -> list[int]:
    return [3 + at % 200 for at in range(length)]


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("name", MODELS)
def test_plan_tells_the_truth(name: str, directories: dict[str, Path]) -> None:
    """By formula it promises less than is measured; once measured it promises just that, and it is kept."""
    estimated = describe(question(directories[name]))
    runner, loaded, measured = engine(directories[name])
    planned = describe(question(directories[name]))
    assert (estimated["steps"], planned["steps"]) == ("estimated", "measured")
    weights = loaded.facts.weights_bytes
    costs = calibrate.costs_of(runner)
    assert planned["weights_bytes"] == pytest.approx(weights, rel=0.01)
    assert planned["kv_bytes_per_token"] == pytest.approx(costs.kv_per_token, rel=0.01)
    room = CEILINGS[name] - weights
    fit = Fit(costs, measured)
    longest = fit.longest(room, loaded.facts.context_length)
    assert planned["longest"] == pytest.approx(longest, rel=0.01)
    assert 500 < longest < 8000, "the memory is to be what bounds it"
    assert 0.5 * longest < estimated["longest"] <= 1.05 * longest

    loop = EngineLoop(
        runner,
        vocab_size=loaded.facts.vocab_size,
        context_length=planned["longest"],
        ceiling=room,
        transient=measured,
        chunk_longest=512,
    )
    served = loop.submit(sequence_of(planned["longest"] - 1), max_tokens=5, ignore_eos=True)
    mx.reset_peak_memory()
    held_before = mx.get_active_memory()
    loop.play()
    ended = loop.answers[served].ended
    assert ended is not None
    assert (ended.reason, len(loop.answers[served].tokens)) == ("length", 1)
    assert mx.get_peak_memory() - held_before <= room
    loop.close()


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("name", MODELS)
def test_the_promised_sessions_run_at_once(name: str, directories: dict[str, Path]) -> None:
    runner, loaded, measured = engine(directories[name])
    room, length = CEILINGS[name], 300
    found = estimate.figures(
        Fit(calibrate.costs_of(runner), measured),
        ceiling=room,
        weights=0,
        context=65_536,
        most_rows=32,
        lengths=(length,),
    )
    count = found["sessions"][str(length)]["at_once"]
    assert 2 <= count < 32, "the memory is to be what bounds it"
    loop = EngineLoop(
        runner,
        vocab_size=loaded.facts.vocab_size,
        context_length=65_536,
        ceiling=room,
        transient=measured,
        chunk_longest=512,
    )
    ids = [loop.submit(sequence_of(length), max_tokens=1024, ignore_eos=True) for _ in range(count)]
    for _ in range(400):
        loop.turn()
        if all(len(loop.answers[id_].tokens) > 3 for id_ in ids):
            break
    running = [s for s in loop.loop.sequences.values() if s.row is not None]
    assert len(running) == count
    assert all(len(loop.answers[id_].tokens) > 3 for id_ in ids)
    assert loop.loop.counts["preempt"] == 0
    assert loop.loop.counts["giveup"] == 0
    for id_ in ids:
        loop.end(id_)
    loop.play()
    loop.close()


def test_a_model_of_the_hub_is_described_from_its_config_alone(tmp_path: Path) -> None:
    """No weight file is there, and the model would be far too large for this machine."""
    large = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28_672,
             "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(scaled_models.config_of("qwen3", **large)))
    before = mx.get_active_memory()
    asked = question(tmp_path, ceiling=96 << 30, backend="metal", here=False, weights=70 << 30)
    found = describe(asked)
    assert mx.get_active_memory() - before < MB
    assert found["kv_bytes_per_token"] == 80 * 2 * 8 * 128 * 2
    assert found["weights_bytes"] == 70 << 30
    assert found["fits"]


def test_a_model_that_cannot_be_built_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_thing"}')
    with pytest.raises(loader.LoadError, match="does not know the architecture 'no_such_thing'"):
        describe(question(tmp_path, weights=1))
