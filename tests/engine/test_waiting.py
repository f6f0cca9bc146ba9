"""The loop rests only where nothing is left to do: who waits for a place has it when it is free."""

from __future__ import annotations

import pytest
from tests.support import tiny_models
from tests.support.engine_loop import EngineLoop

from penstock import wire
from penstock.engine.batch import Runner


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
