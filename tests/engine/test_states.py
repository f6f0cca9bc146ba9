"""Recurrent states over a long life: 50,000 generated tokens leave active memory where it was.

mlx-lm's `ArraysCache.advance` counts in arrays, and every layer and token leaves one behind. Our stacks never
set the counters. The model is recurrent only, so nothing may grow at all and the same rows can go on for the
whole run; from time to time one leaves and another joins.
"""

import mlx.core as mx
import pytest
from tests.support import tiny_models

from penstock.engine.batch import Runner
from penstock.engine.rows import StateStack

ROWS = 50
TOKENS = 50_000
FLAT = 512
"""Bytes; the control below leaves more than five times as much, of fewer tokens."""
CONFIG = tiny_models.config_of(
    "mamba2",
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=3,
    num_heads=1,
    head_dim=8,
    state_size=8,
    vocab_size=16,
)


def growth(runner: Runner, tokens: int, changes: int) -> int:
    """Bytes by which active memory grows over `tokens`, the rows changing `changes` times."""
    rows = [runner.open(0) for _ in range(ROWS)]
    inputs = mx.array([1] * ROWS)
    steps = tokens // ROWS
    before = 0
    for step in range(steps + 1):
        inputs = mx.argmax(runner.decode(rows, inputs), axis=-1)
        mx.async_eval(inputs)
        if step == 0:
            before = settled(inputs)
        elif step % (steps // changes) == 0:
            runner.close(rows.pop(0))
            rows.append(runner.open(0))
    return settled(inputs) - before


def settled(inputs: mx.array) -> int:
    mx.eval(inputs)
    mx.synchronize()
    return int(mx.get_active_memory())


@tiny_models.exact_sizes()
def test_50_000_tokens_leave_memory_flat() -> None:
    assert abs(growth(Runner(tiny_models.make(CONFIG)), TOKENS, changes=20)) <= FLAT


def test_the_leak_of_mlx_lms_own_advance_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = StateStack.gather

    def with_left_padding(stack: StateStack, rows: list) -> list:  # type: ignore[type-arg]
        caches = gather(stack, rows)
        for cache in caches:
            if cache.left_padding is None:
                cache.left_padding = mx.array([0] * len(rows))
        return caches

    monkeypatch.setattr(StateStack, "gather", with_left_padding)
    assert growth(Runner(tiny_models.make(CONFIG)), TOKENS * 2 // 5, changes=1) > 5 * FLAT
