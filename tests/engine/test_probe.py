"""The probe at load: which mode it picks and why, and that it sees what it is there to see."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from tests.support import tiny_models

from penstock.engine import calibrate, device, probe, seams
from penstock.engine.batch import RaggedKV, Runner
from penstock.engine.rows import RowKV


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 4 MB shows as well as one of 64 on models whose activations are some KB."""
    monkeypatch.setattr(probe, "PROBE_BYTES", 4 << 20)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "gemma3_text", "deepseek_v3", "mamba2"])
def test_known_structures_run_ragged(name: str) -> None:
    model = tiny_models.build(name)
    found = probe.probe(model)
    assert found.mode == "ragged"
    assert found.reason.startswith("equal to single rows within ")
    difference, tolerance = probe.compare(Runner(model), model)
    assert difference <= tolerance / 10


def test_attention_that_handles_keys_itself_runs_serially() -> None:
    found = probe.probe(tiny_models.make(tiny_models.config_of("gemma2")))
    assert found.mode == "serial"
    assert found.reason.startswith("a batch of unequal rows fails (")


def test_a_cache_class_without_batched_form_runs_serially() -> None:
    found = probe.probe(tiny_models.build("llama4"))
    assert (found.mode, found.reason) == ("serial", "its ChunkedKVCache has no batched form")


def test_a_missing_seam_runs_serially(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "_PARAMETERS", ("queries", "keys", "values"))
    assert probe.probe(tiny_models.build("qwen3")).mode == "serial"


@pytest.mark.parametrize("mode", ["ragged", "serial"])
def test_the_mode_can_be_told(mode: str) -> None:
    found = probe.probe(tiny_models.build("qwen3"), forced=mode)
    assert (found.mode, found.reason) == (mode, "as told")


def off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = RaggedKV.__init__
    monkeypatch.setattr(
        RaggedKV, "__init__", lambda self, rows, offsets: made(self, rows, offsets + mx.array([0, 1, 0]))
    )


def a_key_less(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = RaggedKV.update_and_fetch

    def fetch_less(self: RaggedKV, keys: mx.array, values: mx.array) -> Any:
        return [
            seams.RaggedArray([part if i else part[:, :, :-1] for i, part in enumerate(ragged.parts)])
            for ragged in fetch(self, keys, values)
        ]

    monkeypatch.setattr(RaggedKV, "update_and_fetch", fetch_less)


def not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = seams.attention

    def attend_badly(queries: mx.array, keys: Any, *args: Any, **kwargs: Any) -> mx.array:
        result = attend(queries, keys, *args, **kwargs)
        return result * mx.nan if isinstance(keys, seams.RaggedArray) else result

    monkeypatch.setattr("mlx_lm.models.qwen3.scaled_dot_product_attention", attend_badly)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("fault", [off_by_one, a_key_less, not_a_number])
def test_wrong_batches_are_found(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    config = tiny_models.config_of("qwen3")
    model = tiny_models.make(config, scale=3.0, dtype=dtype)
    assert probe.probe(model).mode == "ragged"
    monkeypatch.setattr(Runner, "_make_room", lambda *_: None)  # a fault may upset lengths, not the test
    fault(monkeypatch)
    found = probe.probe(model)
    assert found.mode == "serial"


def test_a_sliding_window_is_filled_and_crossed() -> None:
    windows = (24,)
    lengths = [len(prompt) for prompt in probe._prompts(windows, vocab_size=264)]
    assert lengths == [1, 40, 21]
    assert lengths[2] + probe.STEPS > 24
    assert [len(p) for p in probe._prompts((4096,), vocab_size=264)] == [1, 40, 17]


def test_a_model_of_one_layer_may_launch_ahead_here_without_copies() -> None:
    """On the CPU back end; elsewhere the probe decides. The control is the next test."""
    model = tiny_models.make(tiny_models.config_of("qwen3", num_hidden_layers=1))
    assert probe.probe(model).pipelined


def test_copies_of_a_step_launched_ahead_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose steps in flight hold the buffers they read, imitated by views that live as long."""
    fetched: list[Any] = []
    in_flight: list[Any] = []
    fetch, launch, wait = RowKV.keys_and_values, mx.async_eval, mx.eval

    def keys_and_values(cache: RowKV) -> Any:
        fetched.append(fetch(cache))
        return fetched[-1]

    def async_eval(*arrays: Any) -> None:
        launch(*arrays)
        in_flight[:] = fetched
        fetched.clear()

    def evaluate(*arrays: Any) -> None:
        wait(*arrays)
        fetched.clear()

    monkeypatch.setattr(RowKV, "keys_and_values", keys_and_values)
    monkeypatch.setattr(mx, "async_eval", async_eval)
    monkeypatch.setattr(mx, "eval", evaluate)
    model = tiny_models.make(tiny_models.config_of("qwen3", num_hidden_layers=1))
    assert not probe.probe(model, forced="ragged").pipelined


@pytest.mark.parametrize(
    ("backend", "room", "longest"),
    [("cpu", 1 << 40, 4096), ("metal", 1 << 40, 1 << 15), ("cuda", 8 << 20, 2048), ("cuda", -1, 64)],
)
def test_a_gpu_is_looked_at_with_a_long_row_if_there_is_room(
    backend: str, room: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H200 a row of 1,300 ids showed no copies, one of 16,000 did."""
    looked: list[int] = []
    monkeypatch.setattr(device, "backend", lambda: backend)
    monkeypatch.setattr(probe, "_peak", lambda runner, length, ahead: looked.append(length) or 0)
    model = tiny_models.build("qwen3")
    assert calibrate.costs_of(Runner(model)).kv_per_token == 1024
    assert not probe.copies(model, "ragged", room)
    assert set(looked) == {longest, 16}


def test_the_probe_leaves_no_memory_behind() -> None:
    model = tiny_models.build("qwen3_5")
    probe.probe(model)
    mx.synchronize()
    before = mx.get_active_memory()
    probe.probe(model)
    mx.synchronize()
    assert mx.get_active_memory() <= before + 256
