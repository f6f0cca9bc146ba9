"""Launches a prefill chunk layer by layer, so that what it holds is small, and known before.

MLX launches a whole chunk before a GPU has run its first layer, and the activations of every layer that is
launched are there together: four to five times as much with twelve layers (an H200), and it is slower, too.
Its own bound (`set_memory_limit`) looks up only when a command buffer was handed over, on CUDA after up to
1 GB. So each layer says here when it has written its keys, or its state: what leads up to that is launched,
and what came before the last mark is waited for. Owns the last mark. Invariant: one layer's work runs while
the next one is built and launched, never more. One thread uses MLX, so the mark is the module's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_marks: list[mx.array] | None = None
"""The last one, if there is one; None where nobody launches by layers."""


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Within it, layers are launched as they are built. Raises what MLX raises of an earlier one."""
    global _marks  # noqa: PLW0603
    _marks = []
    try:
        yield
    finally:
        _marks = None


def is_on() -> bool:
    """Whether somebody launches by layers."""
    return _marks is not None


def mark(*written: mx.array) -> None:
    """A layer has (lazily) written these; nothing happens outside of `layer_by_layer`.

    The wait is for the layer before, and here, so that its buffers are free when the next one is launched.
    One number is waited for: a view would keep its buffer, a lone element owns itself.
    """
    global _marks  # noqa: PLW0603
    if _marks is None:
        return
    element = mx.contiguous(written[-1][(slice(1),) * written[-1].ndim])
    mx.async_eval(element, *written[:-1])  # type: ignore[no-untyped-call]
    mx.eval(_marks)
    _marks = [element]
