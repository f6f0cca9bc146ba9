"""What is given back after how long without a request: the pool, the prompt cache, the whole engine. Pure.

Each goes once in a quiet time; the next request begins another. The backend gives back and says so.
"""

from __future__ import annotations

from enum import StrEnum

POOL_SECONDS = 5.0


class Part(StrEnum):
    """What can be given back."""

    POOL = "pool"
    CACHE = "prompt_cache"
    ENGINE = "engine"


class Idle:
    """The time since the last request."""

    def __init__(self, release: float | None = None, unload: float | None = None) -> None:
        """Minutes after which the prompt cache, and the engine, go; None: never."""
        after = ((Part.CACHE, release), (Part.ENGINE, unload))
        found = [(minutes * 60, part) for part, minutes in after if minutes is not None]
        self._after = sorted([(POOL_SECONDS, Part.POOL), *found])
        self._left: list[tuple[float, Part]] = []
        self._since: float | None = None

    def look(self, now: float, busy: bool) -> Part | None:
        """What goes now, if anything. `busy`: something is open; call at each request and once a second."""
        if busy or self._since is None:
            self._since, self._left = now, list(self._after)
        elif self._left and now - self._since >= self._left[0][0]:
            return self._left.pop(0)[1]
        return None
