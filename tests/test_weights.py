"""Sizes from headers equal what is loaded; damaged files are refused."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from penstock import models, weights
from penstock.engine import loader


def test_headers_tell_what_loading_takes(tmp_path: Path) -> None:
    tensors = {"a": mx.zeros((3, 5), mx.bfloat16), "b": mx.zeros((7,), mx.uint32), "c": mx.zeros((2,))}
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), tensors)
    assert weights.size(tmp_path, widened=False) == 30 + 28 + 8
    assert weights.size(tmp_path, widened=True) == 60 + 28 + 8


def test_the_demo_model_takes_what_its_headers_say() -> None:
    loaded = loader.load(models.DEMO)
    expected = weights.size(models.DEMO, widened=mx.default_device() == mx.cpu)
    assert loaded.facts.weights_bytes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b"{nope"]
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(weights.WeightsError):
        weights.header(path)
