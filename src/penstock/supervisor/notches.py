"""How far the budget is lowered because engines died for memory, and when it is raised again. Pure.

Each death for memory takes one notch off what the ceiling allows; each quiet time gives one back.
"""

from __future__ import annotations

NOTCH = 7 / 8
DEEPEST = 5
"""Notches in all: about half of the ceiling. What dies below that does not die of its budget."""
QUIET = 300.0
"""Seconds without such a death for one notch back."""


class Notches:
    """The notches in force, over all engines of a server's life."""

    def __init__(self, quiet: float = QUIET) -> None:
        self.count = 0
        self._quiet = quiet
        self._since = 0.0

    def lower(self, now: float) -> None:
        """An engine died for memory, or MLX said that it ran out."""
        self.count = min(self.count + 1, DEEPEST)
        self._since = now

    def look(self, now: float) -> None:
        """Gives a notch back when it has been quiet for long enough."""
        if self.count and now - self._since >= self._quiet:
            self.count -= 1
            self._since = now

    def cap(self, ceiling: int) -> int:
        """What the budget may be at most, in bytes."""
        return int(ceiling * NOTCH**self.count)
