"""A chunk is launched layer by layer: each layer says where it has come to, and is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import mlx.core as mx
import pytest
from tests.engine.test_batch import ARCHITECTURES
from tests.support import tiny_models

from penstock.engine import calibrate, pace
from penstock.engine.batch import Runner


class Watched:
    """What is launched and when all work is waited for, in order."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def async_eval(self, *written: mx.array) -> None:
        self.order.append("launch")
        mx.async_eval(*written)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self.order.append("wait")
        mx.synchronize()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    watched = Watched()
    fake = SimpleNamespace(async_eval=watched.async_eval, synchronize=watched.synchronize)
    monkeypatch.setattr(pace, "mx", fake)
    return watched


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_launched_when_the_one_before_is_done(name: str, watched: Watched) -> None:
    model = tiny_models.build(name)
    runner = Runner(model)
    row = runner.open(4_096)
    mx.eval(runner.prefill(row, [5 + i % 50 for i in range(40)]))
    assert len(row.leaves) >= len(model.layers), "each layer's cache says once that it was written"
    assert watched.order == ["wait", "launch"] * len(row.leaves)


def test_nothing_is_launched_where_a_step_is_only_built(watched: Watched) -> None:
    runner = Runner(tiny_models.build("qwen3_5"))
    before = mx.get_active_memory()
    calibrate.costs_of(runner)
    row = runner.open(4_096)
    runner.build(row, list(range(1, 200)))
    assert mx.get_active_memory() - before < 64 << 10
    mx.eval(row.arrays())
    mx.eval(runner.decode([row], mx.array([1])))
    assert watched.order == []


def test_after_an_error_launching_by_layers_is_off(watched: Watched) -> None:
    def half_a_chunk() -> None:
        with pace.layer_by_layer():
            pace.mark(mx.zeros((1, 2)))
            raise ValueError("halfway")

    runner = Runner(tiny_models.build("qwen3"))
    with pytest.raises(ValueError, match="halfway"):
        half_a_chunk()
    assert watched.order == ["wait", "launch"]
    row = runner.open(8)
    mx.eval(runner.build(row, [1, 2, 3]))
    assert watched.order == ["wait", "launch"]


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "qwen3_5"])
def test_what_a_recurrent_layer_read_goes_when_the_next_has_begun(name: str) -> None:
    """States are slices of what a whole chunk needed; they do not keep it until the last layer is done."""
    peaks = []
    for layers in (8, 32):
        config = tiny_models.config_of(name)
        changed = {**config.get("text_config", config), "num_hidden_layers": layers}
        config = {**config, "text_config": changed} if "text_config" in config else changed
        bench = calibrate._Bench(Runner(tiny_models.make(config)), tiny_models.VOCAB, 1 << 30, lambda: None)
        peaks.append(bench._chunk(1_024, 1)[1].peak)
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.metal
def test_a_chunk_holds_one_layer_and_not_all_of_them() -> None:
    """Eight times the layers, about the same peak beside the rows. CPUs hold no more without the marks."""
    peaks = []
    for layers in (2, 16):
        config = tiny_models.config_of("qwen3", num_hidden_layers=layers, intermediate_size=8_192)
        bench = calibrate._Bench(Runner(tiny_models.make(config)), tiny_models.VOCAB, 1 << 30, lambda: None)
        peaks.append(bench._chunk(1_024, 1)[1].peak)
    print(f"two layers hold {peaks[0]} bytes, sixteen {peaks[1]}")
    assert peaks[1] <= 2 * peaks[0]
