"""The loop rests only where nothing is left to do: who waits for a place has it when it is free."""

from __future__ import annotations

import pytest
from tests.support import tiny_models
from tests.support.engine_loop import EngineLoop

from penstock import wire
from penstock.engine.batch import Runner
from penstock.memory.ledger import Account


@pytest.mark.parametrize("pipelined", [True, False])
def test_who_waits_is_not_left_waiting_when_the_last_row_ends(pipelined: bool) -> None:
    runner = Runner(tiny_models.build("qwen3"))
    engine = EngineLoop(runner, vocab_size=tiny_models.VOCAB, decode_concurrency=1, pipelined=pipelined)
    receive = engine.channel.receive

    def receiving(timeout: float | None = 0.0) -> list[wire.ToEngine]:
        assert timeout == 0.0 or not engine.loop.sequences, "it rests while a request waits"
        return receive(timeout)

    for _ in range(3):
        engine.submit([5, 6, 7], max_tokens=3)
    engine.turn()
    engine.channel.receive = receiving  # type: ignore[method-assign]
    engine.play()
    engine.close()


def told(engine: EngineLoop) -> wire.Status:
    """What the engine would tell the front now."""
    loop = engine.loop
    loop.reporter._last = 0.0
    status = loop.reporter.due(loop.sequences.values(), loop.facts)
    assert status is not None
    return status


def test_under_the_systems_pressure_the_cache_goes_and_the_first_that_waits_still_runs() -> None:
    """The front never cuts the budget below the floor that it is told; that floor protects no cached byte."""
    runner = Runner(tiny_models.build("qwen3"))
    engine = EngineLoop(runner, vocab_size=tiny_models.VOCAB, cache_bytes=None)
    engine.submit(range(5, 205), max_tokens=3)
    engine.play()
    ledger = engine.accounts.ledger
    assert ledger.balance(Account.CACHED) > 0
    ceiling = ledger.budget
    engine.channel.inbox.append(wire.Budget(told(engine).floor, ceiling, "memory pressure"))
    engine.turn()
    assert ledger.balance(Account.CACHED) == 0
    asked = engine.submit(range(300, 500), max_tokens=3)
    engine.turn()
    status = told(engine)
    assert (status.running, status.waiting) == (0, 1)
    engine.channel.inbox.append(wire.Budget(status.floor, ceiling, "memory pressure"))
    engine.play()
    assert len(engine.answers[asked].tokens) == 3
    engine.close()
