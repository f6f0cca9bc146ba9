"""Draws: from the logits of a forward pass to each row's next id, as its settings and its grammar have it.

Owns the settings of the rows that decode together, as arrays that live while the same rows do. Refuses
nothing, waits for nothing. Invariant: a draw is launched once all its masks are there, and a batch without a
grammar is launched with its forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from penstock.engine.penalties import Mask
from penstock.engine.sampler import Sampled, SamplingBatch, sample
from penstock.engine.sequence import Sequence


class Drawing:
    """Launches the draws of one step after the other."""

    def __init__(self, vocab_size: int, eos_ids: Iterable[int], xtc_special: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)
        self._xtc_special = xtc_special
        self._batch: tuple[tuple[int, ...], SamplingBatch] | None = None

    def forget(self) -> None:
        """After an error of MLX nothing of the rows' settings is believed to be on the device."""
        self._batch = None

    def draw(
        self, rows: tuple[Sequence, ...], logits: mx.array, inputs: mx.array, masks: list[Mask]
    ) -> Sampled:
        """The next id of each row, launched: `logits` (B, V) follow `inputs` (B,), the last ids launched."""
        batch = self._settings(rows)
        history: list[Any] = []
        if batch.processors:
            # All ids before the input, which may still be in flight.
            history = [s.tokens if s.launched > len(s.tokens) else s.tokens[:-1] for s in rows]
        excluded = None
        if any(s.must_go_on for s in rows):
            excluded = [tuple(self.eos_ids) if s.must_go_on else () for s in rows]
        positions = [s.launched for s in rows]
        draws = sample(logits, batch, positions, history, inputs, excluded=excluded, masks=masks)
        mx.async_eval(draws)  # type: ignore[no-untyped-call]
        return draws

    def _settings(self, rows: tuple[Sequence, ...]) -> SamplingBatch:
        ids = tuple(s.id for s in rows)
        if self._batch is None or self._batch[0] != ids:
            settings = [s.sampling for s in rows]
            self._batch = ids, SamplingBatch(settings, self._vocab_size, self._xtc_special)
        return self._batch[1]
