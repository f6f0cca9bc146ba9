"""Rows of a busy batch against mlx-lm's own single-sequence loop, and what company may cost: nothing."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest
from tests.support import tiny_models
from tests.support.laws import live_buffers

from penstock.engine import batch, seams
from penstock.engine.batch import RaggedKV, Runner
from penstock.engine.rows import Row, RowKV

TOLERANCE = 1e-4
ARCHITECTURES = (
    "qwen3",
    "llama",
    "qwen3_5",
    "gemma3_text",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "mamba2",
    "falcon_h1",
)


@dataclass
class Request:
    """A row of the busy batch: its prompt's length, the step it joins at, how many tokens it stays for."""

    length: int
    joins: int
    stays: int
    ids: list[int]
    expected: mx.array
    row: Row | None = None
    steps: int = 0
    difference: float = 0.0


PLAN = [(5, 0, 30), (180, 0, 12), (40, 3, 24), (1, 5, 20), (2, 5, 4), (90, 12, 14), (23, 20, 12)]


def build(name: str) -> Any:
    """With deepseek_v3's first seed two experts' scores are so near that the kernels of a BLAS decide."""
    return tiny_models.build(name, 1 if name == "deepseek_v3" else 0)


def busy_requests(name: str) -> list[Request]:
    """The plan's requests, with what mlx-lm's own loop makes of each prompt alone."""
    return [Request(*entry, *expected(name, number)) for number, entry in enumerate(PLAN)]


@functools.cache
def expected(name: str, number: int) -> tuple[list[int], mx.array]:
    length, _, stays = PLAN[number]
    prompt = [(number * 37 + i * (number + 3)) % tiny_models.VOCAB for i in range(length)]
    tokens, logprobs = tiny_models.reference(build(name), prompt, stays)
    return prompt + tokens, logprobs


Tamper = Callable[[Runner, list[Request]], None]


def run(runner: Runner, requests: list[Request], tamper: Tamper | None = None, at: int = 8) -> None:
    """Decode under the reference's tokens, one step at a time; rows join and leave as planned."""
    for step in range(max(r.joins + r.stays for r in requests) + 1):
        for request in requests:
            if request.joins == step:
                request.row = runner.open(request.length + 4)  # too little: rows grow on the way
                prompt = request.ids[: request.length - 1]
                for start in range(0, len(prompt), 100):
                    mx.eval(runner.prefill(request.row, prompt[start : start + 100]))
        live = [r for r in requests if r.row is not None and r.steps < r.stays]
        if not live:
            continue
        if tamper and step == at:
            tamper(runner, live)
        inputs = mx.array([r.ids[r.length - 1 + r.steps] for r in live])
        logits = runner.decode([r.row for r in live if r.row], inputs)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for request, actual in zip(live, logprobs, strict=True):
            expected = request.expected[request.steps]
            request.difference = max(request.difference, mx.max(mx.abs(actual - expected)).item())
            if tamper is None:
                assert mx.argmax(actual).item() == request.ids[request.length + request.steps]
            request.steps += 1
            if request.steps == request.stays and request.row:
                runner.close(request.row)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_busy_batch_equals_each_row_alone(name: str) -> None:
    runner = Runner(build(name))
    assert runner.mode == "ragged"
    requests = busy_requests(name)
    run(runner, requests)
    assert all(request.steps == request.stays for request in requests)
    assert max(request.difference for request in requests) <= TOLERANCE
    assert live_buffers(runner) == []


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3_text"])
def test_serial_rows_equal_each_row_alone(name: str) -> None:
    runner = Runner(tiny_models.build(name), "serial")
    requests = busy_requests(name)
    run(runner, requests)
    assert max(request.difference for request in requests) <= TOLERANCE


def a_position_off_by_one(runner: Runner, live: list[Request]) -> None:
    assert live[0].row
    live[0].row.length += 1


def a_key_lost(runner: Runner, live: list[Request]) -> None:
    assert live[0].row
    cache = live[0].row.kv[0]
    cache.keys[..., cache.offset - 1, :] = 0


def a_state_from_the_wrong_row(runner: Runner, live: list[Request]) -> None:
    state = runner._stack.caches[0]
    states = mx.split(state[1], len(live))
    state[1] = mx.concatenate([states[1], *states[1:]])


@pytest.mark.parametrize(
    ("name", "tamper"),
    [
        ("qwen3", a_position_off_by_one),
        ("deepseek_v3", a_position_off_by_one),
        ("qwen3", a_key_lost),
        ("qwen3_5", a_state_from_the_wrong_row),
        ("mamba2", a_state_from_the_wrong_row),
    ],
)
def test_a_broken_row_exceeds_the_tolerance_tenfold_and_alone(name: str, tamper: Tamper) -> None:
    requests = busy_requests(name)
    run(Runner(build(name)), requests, tamper, at=8)
    assert requests[0].difference >= 10 * TOLERANCE
    assert max(request.difference for request in requests[1:]) <= TOLERANCE


def test_steps_launched_ahead_give_the_same_tokens() -> None:
    """A model of one layer: the next step's writes come right behind the attention that reads the buffers."""
    model = tiny_models.make(tiny_models.config_of("qwen3", num_hidden_layers=1), scale=3.0)
    prompts = [[5, 6, 7], [*range(9, 100)], [11]]
    expected = [tiny_models.greedy(model, prompt, 24) for prompt in prompts]
    runner = Runner(model)
    rows = [runner.open(len(prompt) + 30) for prompt in prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt[:-1]:
            mx.eval(runner.prefill(row, prompt[:-1]))
    tokens = mx.array([prompt[-1] for prompt in prompts])
    steps = []
    for _ in range(24):
        following = mx.argmax(runner.decode(rows, tokens), axis=-1)
        mx.async_eval(following)
        steps.append(tokens.tolist())  # reads the step before, while this one runs
        tokens = following
    steps.append(tokens.tolist())
    assert [list(row) for row in zip(*steps[1:], strict=True)] == expected


def address(array: mx.array) -> int:
    import numpy as np

    return int(np.asarray(array).__array_interface__["data"][0])


@tiny_models.exact_sizes()
def test_joining_and_leaving_moves_no_other_row() -> None:
    model = tiny_models.build("qwen3")
    runner = Runner(model)
    long = runner.open(4000)
    mx.eval(runner.prefill(long, range(200)))
    places = [address(array) for array in long.arrays()]
    mx.synchronize()
    before, size = mx.get_active_memory(), runner.row_bytes(long)
    mx.reset_peak_memory()
    for count in (1, 3, 2, 5):
        short = [runner.open(16) for _ in range(count)]
        for _ in range(3):
            mx.eval(runner.decode([*short, long], mx.array([1] * (count + 1))))
        for row in short:
            runner.close(row)
    assert [address(array) for array in long.arrays()] == places
    assert mx.get_peak_memory() - before < size / 8
    assert mx.get_active_memory() - before < size / 100


@tiny_models.exact_sizes()
def test_memory_is_the_sum_of_the_rows_and_goes_with_them() -> None:
    model = tiny_models.build("qwen3_5")
    runner = Runner(model)
    mx.synchronize()
    before = mx.get_active_memory()
    rows = [runner.open(capacity) for capacity in (1000, 20, 20)]
    for row in rows:
        mx.eval(runner.prefill(row, [1, 2, 3]))
    for _ in range(3):
        mx.eval(runner.decode(rows, mx.array([1, 2, 3])))
    alone = [runner.row_bytes(row) for row in rows]
    assert batch._allocated(live_buffers(runner)) == sum(alone)
    assert alone[0] - alone[1] == pytest.approx(980 * 256, rel=0.1)  # one attention layer in four
    runner.close(rows[0])
    mx.eval(runner.decode(rows[1:], mx.array([2, 3])))
    assert batch._allocated(live_buffers(runner)) == sum(alone[1:])
    for row in rows[1:]:
        runner.close(row)
        runner.close(row)
    assert live_buffers(runner) == []
    assert mx.get_active_memory() <= before + 64


def test_a_row_that_stays_behind_owns_its_state() -> None:
    """After a step without it, a row's states are copies: a view would keep the whole batch's alive."""
    model = tiny_models.make(
        tiny_models.config_of("mamba2", num_heads=64, hidden_size=32, num_hidden_layers=2)
    )
    runner = Runner(model)
    rows = [runner.open(0) for _ in range(8)]
    mx.eval(runner.decode(rows, mx.array([1] * 8)))
    mx.eval(runner.decode(rows[:2], mx.array([1] * 2)))
    state = rows[7].arrays()
    mx.eval(state)
    assert mx.get_array_buffer_size(state) < 1.1 * sum(array.nbytes for array in state)


def test_rows_change_between_steps_together_steps_alone_and_prefill() -> None:
    model = tiny_models.build("qwen3_5")
    ids = [[(i * 7) % 250 for i in range(40)], [(i * 5) % 250 for i in range(12)]]
    expected = [tiny_models.reference(model, prompt, 3)[0] for prompt in ids]
    runner = Runner(model)
    row, other = runner.open(8), runner.open(8)
    mx.eval(runner.prefill(row, ids[0][:10]))
    for i in range(4):
        mx.eval(runner.decode([other, row], mx.array([ids[1][i], ids[0][10 + i]])))
    mx.eval(runner.prefill(row, ids[0][14:39]))  # straight out of the batch
    for i in range(4, 8):
        mx.eval(runner.decode([other, row][: i % 2 + 1], mx.array([ids[1][i], 0][: i % 2 + 1])))
        if i % 2:
            runner.close(row)
            row = runner.open(64)
            mx.eval(runner.prefill(row, ids[0][:39]))
    mx.eval(runner.prefill(other, ids[1][8:11]))
    tokens: list[list[int]] = []
    last = [ids[0][39], ids[1][11]]
    for _ in range(3):
        last = mx.argmax(runner.decode([row, other], mx.array(last)), axis=-1).tolist()
        tokens.append(last)
    assert [list(column) for column in zip(*tokens, strict=True)] == expected


def test_a_missing_seam_means_serial_rows_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "_PARAMETERS", ("queries", "keys", "values"))
    runner = Runner(tiny_models.build("qwen3"))
    assert runner.mode == "serial"
    assert "scaled_dot_product_attention takes queries, keys, values, cache" in runner.reason


def test_an_unknown_cache_class_means_serial_rows_and_they_are_right() -> None:
    runner = Runner(tiny_models.build("llama4"))
    assert (runner.mode, runner.reason) == ("serial", "its ChunkedKVCache has no batched form")
    requests = busy_requests("llama4")
    run(runner, requests)
    assert max(request.difference for request in requests) <= TOLERANCE


@pytest.mark.parametrize("count", [1, 3])
def test_evaluated_logits_mean_evaluated_state(count: int) -> None:
    runner = Runner(tiny_models.build("qwen3_5"))
    rows = [runner.open(8) for _ in range(count)]
    mx.eval(runner.decode(rows, mx.array([1] * count)))
    assert mx.get_array_buffer_size(live_buffers(runner)) > 0  # raises for what is not evaluated


def test_a_window_masks_each_row_by_its_own_length() -> None:
    rows = [RowKV(8), RowKV(8)]
    rows[0].offset, rows[1].offset = 2, 6
    view = RaggedKV(rows, mx.array([2, 6]))
    assert view.make_mask(1) is None
    short, long = view.make_mask(1, window_size=4).parts
    assert short.tolist() == [[True] * 3]
    assert long.tolist() == [[False] * 3 + [True] * 4]


def test_layers_may_share_what_another_wrote() -> None:
    view = RaggedKV([RowKV(4), RowKV(4)], mx.array([0, 0]))
    with pytest.raises(AttributeError):
        view.keys_and_values()
    written = view.update_and_fetch(mx.ones((2, 1, 1, 4)), mx.ones((2, 1, 1, 4)))
    assert view.keys_and_values() is written
