"""The one patched function of mlx-lm: that it is where we think, and that misuse of ragged keys is loud."""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from penstock.engine import seams

from mlx_lm.models import base  # isort: skip - after our package, which makes this import light


def test_the_seam_is_mlx_lms_models_base_scaled_dot_product_attention() -> None:
    """If a release of mlx-lm moves or changes it, this says so; at run time rows go serial instead."""
    assert seams.missing() is None
    assert seams._original is not None
    assert seams._original.__module__ == "mlx_lm.models.base"
    names = list(inspect.signature(seams._original).parameters)
    assert names == ["queries", "keys", "values", "cache", "scale", "mask", "sinks"]
    assert names == list(inspect.signature(seams.attention).parameters)


def test_it_is_patched_everywhere_whatever_was_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    early = ModuleType("mlx_lm.models.imported_early")
    early.scaled_dot_product_attention = seams._original  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, early.__name__, early)
    assert seams.install() is None
    assert seams.install() is None
    late = importlib.import_module("mlx_lm.models.qwen2")
    for module in (early, late, base):
        assert module.scaled_dot_product_attention is seams.attention


def test_a_release_without_the_seam_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "_original", None)
    assert seams.install() == "mlx-lm's models.base has no scaled_dot_product_attention"


def parts(*lengths: int) -> list[mx.array]:
    return [mx.random.normal((1, 2, n, 4), key=mx.random.key(n)) for n in lengths]


def test_each_row_attends_to_its_own_keys() -> None:
    queries = mx.random.normal((3, 4, 1, 4))
    keys, values = parts(3, 17, 8), parts(4, 18, 9)
    values = [value[:, :, 1:] for value in values]
    masks = [None, mx.arange(17) > 3, None]
    sinks = mx.array([0.1, 0.2, 0.3, 0.4])
    ragged = seams.attention(
        queries,
        seams.RaggedArray(keys),
        seams.RaggedArray(values),
        scale=0.5,
        mask=seams.RaggedArray(masks),
        sinks=sinks,
    )
    for i in range(3):
        alone = mx.fast.scaled_dot_product_attention(
            queries[i : i + 1], keys[i], values[i], scale=0.5, mask=masks[i], sinks=sinks
        )
        assert mx.allclose(ragged[i : i + 1], alone, atol=1e-6)


def test_latent_attention_multiplies_first() -> None:
    ragged = seams.RaggedArray(parts(3, 5)).swapaxes(-1, -2).astype(mx.float16)
    assert ragged.dtype == mx.float16
    product = mx.ones((2, 2, 1, 4)) @ ragged
    assert isinstance(product, seams.RaggedArray)
    assert [part.shape for part in product.parts] == [(1, 2, 1, 3), (1, 2, 1, 5)]


OTHER = mx.ones((2, 2, 1, 4))
MISUSES: list[Callable[[Any], Any]] = [
    lambda x: x + 1,
    lambda x: OTHER + x,
    lambda x: x * OTHER,
    lambda x: OTHER * x,
    lambda x: x @ OTHER,
    lambda x: x.shape,
    lambda x: x.ndim,
    lambda x: x.size,
    lambda x: x.T,
    lambda x: x[0],
    lambda x: x[..., :3, :],
    len,
    list,
    lambda x: x.transpose(0, 2, 1, 3),
    lambda x: x.reshape(-1),
    lambda x: x.sum(),
    lambda x: x == OTHER,
    lambda x: x > 0,
    lambda x: -x,
    bool,
    lambda x: x.item(),
    lambda x: x.tolist(),
    lambda x: mx.where(mx.ones((2, 2, 1, 5)) > 0, x, 0),
    lambda x: mx.matmul(OTHER, x),
    lambda x: mx.concatenate([x, OTHER]),
    lambda x: mx.fast.scaled_dot_product_attention(OTHER, x, x, scale=1.0),
    lambda x: seams.attention(OTHER, x, x, mask=mx.ones((1, 5)) > 0),
    lambda x: seams.attention(OTHER, x, x, mask=mx.ones((1, 1)) > 0),
    lambda x: seams.attention(OTHER, x, x, mask=mx.where(mx.array(True), x, 0)),
    lambda x: seams.attention(OTHER, mx.repeat(x, 2, axis=0), x),
]


@pytest.mark.parametrize("misuse", MISUSES, ids=range(len(MISUSES)))
def test_anything_else_with_ragged_keys_is_refused(misuse: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        mx.eval(misuse(seams.RaggedArray(parts(3, 5))))


def test_ordinary_attention_is_mlx_lms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(seams, "_original", lambda *args, **kwargs: calls.append(kwargs))
    seams.attention(OTHER, OTHER, OTHER, "cache", 0.5, mask="causal")
    assert calls == [{"cache": "cache", "scale": 0.5, "mask": "causal", "sinks": None}]
