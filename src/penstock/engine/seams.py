"""The one function of mlx-lm that we replace, and the array type that makes it see a ragged batch.

Owns the patch of `mlx_lm.models.base.scaled_dot_product_attention` and `RaggedArray`, what a layer's cache
returns in a ragged decode step: the keys (or values) of all rows, each of its own length. Model code passes
it on to the attention function untouched, or (MLA) multiplies with it first.
Refuses every other use of a `RaggedArray`, loudly: an operation that MLX would carry out on the empty
payload gives a wrong answer without an error. Invariant: calls with ordinary keys are mlx-lm's own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm.models import base

SEAM = "scaled_dot_product_attention"
_PARAMETERS = ("queries", "keys", "values", "cache", "scale", "mask", "sinks")
_MODELS = "mlx_lm.models."

_original: Callable[..., mx.array] | None = getattr(base, SEAM, None)


class RaggedArray(mx.array):
    """The parts of a ragged batch, one array (or None) per row, as one value that model code can hand on.

    It is an mx.array (empty, of shape (1, 0)) because Python tries the reflected method of a subclass
    first: `queries @ ragged` reaches `__rmatmul__` here, where a foreign class would get a TypeError.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        dtype = next((part.dtype for part in parts if part is not None), mx.float32)
        super().__init__([[]], dtype)
        self.parts = parts

    @property
    def dtype(self) -> mx.Dtype:
        return next((part.dtype for part in self.parts if part is not None), mx.float32)

    def astype(self, dtype: mx.Dtype) -> RaggedArray:  # type: ignore[override]
        return RaggedArray([None if part is None else part.astype(dtype) for part in self.parts])

    def swapaxes(self, first: int, second: int) -> RaggedArray:  # type: ignore[override]
        return RaggedArray([None if part is None else part.swapaxes(first, second) for part in self.parts])

    def __rmatmul__(self, left: mx.array) -> RaggedArray:
        return RaggedArray([a @ b for a, b in zip(split(left, len(self.parts)), self.parts, strict=True)])


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(*_: object, **__: object) -> NoReturn:
        raise TypeError(f"array.{name} is not defined for the keys and values of a ragged batch")

    return refused


_ALLOWED = {name for name in vars(RaggedArray) if callable(vars(RaggedArray)[name])} | {"dtype"}
_OBJECT = {
    name for name in dir(object) if name not in {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
}

for _name in set(dir(mx.array)) - _ALLOWED - _OBJECT - {"__del__", "__dict__", "__module__"}:
    _refused: Any = _refuse(_name)
    if not callable(getattr(mx.array, _name)):
        _refused = property(_refused)
    setattr(RaggedArray, _name, _refused)


def split(batch: mx.array, rows: int) -> list[mx.array]:
    """(B, ...) as B arrays of (1, ...)."""
    return [batch] if rows == 1 else list(mx.split(batch, rows, axis=0))


def attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any = None,
    scale: float = 1.0,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`, and row by row where `keys` is a `RaggedArray`.

    queries (B, H, L, D); keys and values (B, H_kv, S, D) or ragged with B parts; mask None, "causal",
    bool or additive, ragged where it depends on the row's length. Returns (B, H, L, D_v). Raises TypeError
    for a dense mask beside ragged keys: it can't fit rows of different length.
    """
    assert _original is not None
    if not isinstance(keys, RaggedArray):
        return _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    count = len(keys.parts)
    if isinstance(mask, RaggedArray):
        masks: Sequence[Any] = mask.parts
    elif isinstance(mask, mx.array):
        raise TypeError("a dense mask can't be used with the keys of a ragged batch")
    else:
        masks = [mask] * count
    rows = zip(split(queries, count), keys.parts, values.parts, masks, strict=True)
    outputs = [
        _original(q, k, v, cache=None, scale=scale, mask=m, sinks=sinks)  # `cache` only tells quantised keys
        for q, k, v, m in rows
    ]
    return outputs[0] if count == 1 else mx.concatenate(outputs, axis=0)


def missing() -> str | None:
    """Why the seam can't be patched in the installed mlx-lm, or None if it can."""
    if _original is None:
        return f"mlx-lm's models.base has no {SEAM}"
    names = tuple(inspect.signature(_original).parameters)
    return None if names == _PARAMETERS else f"mlx-lm's {SEAM} takes {', '.join(names)}"


def install() -> str | None:
    """Patch the seam, also in model modules imported before; repeatable. Returns `missing()`."""
    reason = missing()
    if reason is None:
        setattr(base, SEAM, attention)
        for name, module in list(sys.modules.items()):
            if name.startswith(_MODELS) and getattr(module, SEAM, None) is _original:
                setattr(module, SEAM, attention)
    return reason
