"""What runs at this moment: the rows in flight and those being launched, written to the page before a launch.

Owns the names that an engine's death or a step's error is held against, the time that the step should take,
and which shapes have run before (the first step of a new one may compile kernels). The device works behind
the host: what was launched and not yet read is named too. Invariant: no row computes that is not named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from penstock.engine.sequence import Sequence
from penstock.guilt import Span
from penstock.page import Page, Phase

DECAY = 0.3
"""Weight of the last step in the time that a decode step should take."""


class Running:
    """The page's one writer of rows."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._rows: dict[int, tuple[Sequence, int, int]] = {}
        self._shapes: set[tuple[Phase, int]] = set()
        self._launched: set[tuple[Phase, int]] = set()
        self._step_seconds = 0.0

    def only(self, sequences: Iterable[Sequence]) -> None:
        """These are still in flight, as far as they were launched; a new step is about to be launched."""
        self._rows = {s.id: (s, s.computed, max(s.launched, s.computed + 1)) for s in sequences}

    def entering(self, sequence: Sequence) -> None:
        """What is found of it in the cache is about to be copied."""
        self._rows[sequence.id] = (sequence, 0, 1)

    def decode(self, rows: Iterable[Sequence]) -> None:
        """A decode step of these is about to be launched."""
        count = 0
        for count, s in enumerate(rows, 1):  # noqa: B007
            self._rows[s.id] = (s, s.computed, s.launched + 1)
        self._begin(Phase.DECODE, count, self._step_seconds)

    def prefill(self, sequence: Sequence, length: int, seconds_per_id: float) -> None:
        """A chunk of `length` ids is about to be launched."""
        self._rows[sequence.id] = (sequence, sequence.computed, sequence.launched + length)
        self._begin(Phase.PREFILL, length, length * seconds_per_id + self._step_seconds)

    def read(self, seconds: float, decoded: bool) -> None:
        """A step was read cleanly, `seconds` after its launch."""
        self._shapes |= self._launched
        self._launched.clear()
        if decoded:
            self._step_seconds += DECAY * (seconds - self._step_seconds)

    def accused(self, alive: Mapping[int, Sequence]) -> list[tuple[Sequence, Span]]:
        """The rows that an error now is held against; all on board, if none of those named is there still."""
        named = [(s, (start, end)) for s, start, end in self._rows.values()]
        named = [(s, span) for s, span in named if alive.get(s.id) is s and s.row is not None]
        return named or [(s, (s.computed, s.launched + 1)) for s in alive.values() if s.row is not None]

    def _begin(self, phase: Phase, size: int, predicted: float) -> None:
        shape = (phase, size.bit_length())
        if shape not in self._shapes:
            self._launched.add(shape)
            phase = Phase.FIRST_OF_SHAPE
        rows = [(id, start, end) for id, (_, start, end) in self._rows.items()]
        self._page.begin(phase, rows, predicted)
