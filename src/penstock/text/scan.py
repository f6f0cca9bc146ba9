"""Finding strings in text that arrives in parts: what is certain, what matched, what must wait.

Pure. The answer doesn't depend on where the parts are cut: the match that is complete first wins, and of
two complete at the same character the longer. Invariant: nothing is kept back that can't become a match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


class Patterns:
    """A set of strings to look for. Empty strings are ignored."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(dict.fromkeys(string for string in strings if string))
        first = "".join(sorted({re.escape(string[0]) for string in self.strings}))
        self._first = re.compile(f"[{first}]" if first else "(?!)").search

    def scan(self, text: str) -> tuple[int, str | None]:
        """(cut, match): `text[:cut]` is certain; at `cut` stands the match, or else what must wait."""
        found = self._first(text)
        if found is None:
            return len(text), None
        places = ((text.find(string, found.start()), string) for string in self.strings)
        ends = [(at + len(string), at, string) for at, string in places if at >= 0]
        if ends:
            _, at, match = min(ends)
            return at, match
        while found is not None:
            rest = text[found.start() :]
            if any(string.startswith(rest) for string in self.strings):
                return found.start(), None
            found = self._first(text, found.start() + 1)
        return len(text), None
