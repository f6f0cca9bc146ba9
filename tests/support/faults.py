"""Faults for engines under test: poisoned rows, and MLX's late errors, from a file cut off once mapped.

`Poisoned` stands between the loop and its runner. An id is poison: a step that computes it fails, in the way
that `how` says. Production code has no hook for it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

MOST_LATE = 12
_late = 0


def late_error() -> mx.array:
    """A float32 zero whose evaluation fails on the stream's thread: MLX raises later, perhaps elsewhere."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "cut.safetensors")
        mx.save_safetensors(path, {"x": mx.ones((512, 512))})
        array = mx.load(path)["x"]  # type: ignore[index]
        os.truncate(path, 200)
        return (array * 0).sum()  # type: ignore[union-attr]


def late_error_or_raise() -> mx.array:
    """`late_error` for the first times in a process, then `raises`.

    MLX's CPU back end forgets a running task with some errors that it raises at a launch, and after ten of
    those it may wait for one that is over.
    """
    global _late  # noqa: PLW0603
    _late += 1
    return late_error() if _late <= MOST_LATE else raises()


def raises() -> mx.array:
    """An error at launch."""
    raise RuntimeError("[METAL] a scripted failure")


def aborts() -> mx.array:
    """The process's end that accuses who ran."""
    os.kill(os.getpid(), signal.SIGABRT)
    raise AssertionError("it goes on")


class Poisoned:
    """A runner whose prefill and decode fail where `is_poison(row ids)`; `calls` counts launches.

    `how` returns an array that is added to what the step computes.
    """

    def __init__(
        self,
        runner: Any,
        how: Callable[[], mx.array],
        poison: int | None = None,
        at: Sequence[int] = (),
    ) -> None:
        """`poison`: the id that must not be computed; `at`: numbers of launches that fail whoever runs."""
        self._runner = runner
        self._how = how
        self._poison = poison
        self._at = at
        self.calls = 0
        self.failed: list[int] = []
        """How many rows were in each step that failed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def _strikes(self, ids: Sequence[int], rows: int) -> bool:
        self.calls += 1
        strikes = self.calls in self._at or (self._poison is not None and self._poison in ids)
        if strikes:
            self.failed.append(rows)
        return strikes

    def prefill(self, row: Any, ids: Sequence[int]) -> list[mx.array]:
        strikes = self._strikes(ids, 1)
        arrays: list[mx.array] = self._runner.prefill(row, ids)
        return [*arrays, self._how()] if strikes else arrays

    def decode(self, rows: Sequence[Any], inputs: mx.array) -> mx.array:
        known = inputs.tolist() if self._poison is not None else []
        strikes = self._strikes(known, len(rows))  # type: ignore[arg-type]
        logits: mx.array = self._runner.decode(rows, inputs)
        return logits + self._how() if strikes else logits
