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


def test_a_whole_file_is_told_from_one_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.zeros((3, 5)), "b": mx.zeros((7,))})
    whole = path.read_bytes()
    assert weights.check(path) == len(whole)
    path.write_bytes(whole[:-1])
    with pytest.raises(weights.WeightsError, match="is cut off"):
        weights.check(path)


@pytest.mark.parametrize("tensor", [b"7", b"{}", b'{"data_offsets": 7}', b'{"data_offsets": [0]}'])
def test_a_header_that_says_nothing_of_places_is_damaged(tmp_path: Path, tensor: bytes) -> None:
    path = tmp_path / "model.safetensors"
    header = b'{"a": ' + tensor + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(weights.WeightsError, match="damaged header"):
        weights.check(path)
