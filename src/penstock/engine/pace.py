"""Launches a prefill chunk layer by layer, so that what it holds is small, and known before.

MLX launches a whole chunk before a GPU has run its first layer, and the activations of every layer that is
launched are there together: four to five times as much with twelve layers (an H200), and it is slower, too.
Its own bound (`set_memory_limit`) looks up only when a command buffer was handed over, on CUDA after up to
1 GB. So each layer says here when it has written its keys, or its state: what came before is waited for, and
what leads up to that is launched. Invariant: one layer's work runs while the next one is built, and nothing
of it is left when that is launched, however fast the device is. One thread uses MLX, so the switches are the
module's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

_on = False
_done: Callable[[], object] | None = None
"""Called whenever a layer is done."""


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Within it, layers are launched as they are built. Raises what MLX raises of an earlier one."""
    global _on  # noqa: PLW0603
    _on = True
    try:
        yield
    finally:
        _on = False


@contextmanager
def watched(done: Callable[[], object]) -> Iterator[None]:
    """Within it, `done` is called when what was launched up to a mark is done and its buffers are free."""
    global _done  # noqa: PLW0603
    _done = done
    try:
        yield
    finally:
        _done = None


def is_on() -> bool:
    """Whether somebody launches by layers."""
    return _on


def mark(*written: mx.array) -> None:
    """A layer has (lazily) written these; nothing happens outside of `layer_by_layer`.

    `synchronize` and not `eval`: that returns when the work is done, this when its buffers are free as well.
    """
    if _on:
        mx.synchronize()
        if _done is not None:
            _done()
        mx.async_eval(*written)  # type: ignore[no-untyped-call]
