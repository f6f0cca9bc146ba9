"""Who made the engine die, or a step fail. Pure; the front judges deaths by it, the engine errors.

Accused are the rows that were running, each over a span of its ids: where it stood, and how far the launched
steps would have brought it. An accusation that is not about the same span again has been outlived. Refuses to
convict by company: guilty is who was accused alone twice over one span, or alone while it ran apart. Who was
accused twice in company runs apart from then on: one at a time, alone in its steps, until it has passed.

    accused ──again, alone both times──────────────▶ guilty
       └─────again, in company──▶ apart ──alone────▶ guilty
    either, when the span is passed ──▶ innocent
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Span = tuple[int, int]
"""From which position of its ids, and up to which (exclusive)."""
MEMORY_WORDS = re.compile(
    r"out of memory|insufficient memory|OutOfMemory|unable to allocate|cannot allocate|bad_alloc"
    r"|MemoryError|Resource limit \(",
    re.IGNORECASE,
)
"""How back ends, allocators and systems say that memory ran out."""
PATIENCE = 3
"""Deaths for memory over one span before a row has to pass it with nobody else on board."""


@dataclass(slots=True)
class Accusation:
    """The last one of a row. `deaths`: how often it was repeated, of deaths that look like memory."""

    span: Span
    alone: bool = False
    apart: bool = False
    deaths: int = 1

    def repeats(self, span: Span) -> bool:
        """The row has not advanced beyond the span since, and is in it again."""
        return span[0] < self.span[1] and self.span[0] < span[1]

    def passed(self, position: int) -> bool:
        """Everything of the span has been computed."""
        return position >= self.span[1]


class Suspect(Protocol):
    """What is judged: a journal's entry, or an engine's sequence."""

    accusation: Accusation | None


S = TypeVar("S", bound=Suspect)


def judge(accused: Sequence[tuple[S, Span]]) -> list[S]:
    """Judges a death or an error; returns who must fail, and notes what is held against the others."""
    alone = len(accused) == 1
    guilty = []
    for suspect, span in accused:
        before = suspect.accusation
        if before is None or not before.repeats(span):
            suspect.accusation = Accusation(span, alone)
        elif alone and (before.alone or before.apart):
            guilty.append(suspect)
        else:
            start, end = min(span[0], before.span[0]), max(span[1], before.span[1])
            suspect.accusation = Accusation((start, end), alone, apart=True)
    return guilty


def judge_memory(accused: Iterable[tuple[S, Span]], *, sole: bool, lowered: bool) -> list[S]:
    """Judges a death for memory: guilty is only who died twice over one span, now alone on board.

    `sole`: nobody else had memory in the engine; `lowered`: its budget had been lowered before. Who is
    accused for the `PATIENCE`th time is to be alone on board next (`must_be_sole`).
    """
    guilty = []
    for suspect, span in accused:
        before = suspect.accusation
        if before is None or not before.repeats(span):
            suspect.accusation = Accusation(span)
        elif sole and lowered:
            guilty.append(suspect)
        else:
            before.deaths += 1
    return guilty


def must_be_sole(suspect: Suspect, position: int) -> bool:
    """Whether it ran at too many deaths for memory, and has to pass the span with nobody else on board."""
    accusation = suspect.accusation
    return accusation is not None and accusation.deaths >= PATIENCE and not accusation.passed(position)
