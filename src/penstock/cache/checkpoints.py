"""Where a prefill keeps the state of layers that can't be cut, and which kept states go. Pure arithmetic.

A state is as big as the K/V of a thousand ids and more, so there are few: where messages meet, where prompts
were seen to part, and at doubling distances from the end. Borders are found in the ids themselves. A wrong
border costs bytes, never correctness, because the tree compares ids in full.
Invariant: every position p asked for is in the part to compute, start < p ≤ prompt length.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

from penstock.cache.nodes import Checkpoint, common

MOST = 6
"""New states of one prefill at most."""
NEAR = 64
"""Ids behind a state within which a message gets none: they are cheaper to compute than to keep."""
RECENT = 2
"""The deepest states of a path, which no thinning takes: a turn's end and its generation prompt."""
ANCHORS = 2
"""The latest anchors that thinning spares: what a later turn strips, it strips from there on."""


@dataclass(frozen=True, slots=True)
class Markers:
    """Special ids of a template: messages begin with one of `openers` or end with one of `closers`.

    `preamble`: ids before the first message, whatever it is. Both sets empty: the template resists.
    """

    openers: frozenset[int]
    closers: frozenset[int]
    preamble: int


def differs(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two renderings have in common.

    Of a prompt and the same with one more dummy message: where the next turn will leave this prompt. A dummy
    user message finds stripped thinking, too: the history is rendered as it will look then.
    """
    return common(memoryview(array("I", first)).cast("B"), 0, bytearray(array("I", second).tobytes()))


def learn(renderings: Sequence[Sequence[int]], special: Container[int]) -> Markers:
    """What opens and closes messages, from one conversation rendered with one message, two, three, …

    Without generation prompt. Each rendering parts from the one before where a message begins: the id there
    opens messages if it is special, else the one before closes them if it is. Texts must hold no special id.
    """
    openers: set[int] = set()
    closers: set[int] = set()
    for shorter, longer in pairwise(renderings):
        at = differs(shorter, longer)
        if at < len(longer) and longer[at] in special:
            openers.add(longer[at])
        elif 0 < at < len(longer) and longer[at - 1] in special:
            closers.add(longer[at - 1])
    first = renderings[0] if renderings else []
    preamble = next((at for at, token in enumerate(first) if token in openers), 0)
    return Markers(frozenset(openers), frozenset(closers), preamble)


def borders(ids: array[int], markers: Markers) -> list[int]:
    """Where messages but the first begin in `ids`, ascending; the last is the generation prompt's start."""
    found = {at for at, token in enumerate(ids) if token in markers.openers}
    found |= {at + 1 for at, token in enumerate(ids) if token in markers.closers}
    return sorted(at for at in found if markers.preamble < at < len(ids))


def positions(
    prompt_length: int,
    borders: Sequence[int],
    start: int,
    diverged_at: int | None,
    state_tokens: int,
    turn: int | None = None,
) -> list[int]:
    """Where a prefill from `start` on keeps states, ascending, at most `MOST`. Chunks are cut only there.

    In this order: the generation prompt's start (last border; the prompt's end where there are none), `turn`
    (where the next turn will leave: see `differs`), `diverged_at` (where an earlier prompt parted), the end
    of system and tools (first border), two more borders from the end; from `diverged_at` on none that is less
    than `NEAR` behind `start` or another. Then doubling distances from the end, `state_tokens` or more from
    `start` and from all others.
    """
    edges = sorted(borders) or [prompt_length]
    chosen: list[int] = []
    for position in (edges[-1], turn, diverged_at, edges[0], *reversed(edges[-3:-1])):
        if position is None or not start < position <= prompt_length or position in chosen:
            continue
        if position in (edges[-1], turn) or all(not 0 < position - at < NEAR for at in (start, *chosen)):
            chosen.append(position)
    distance = apart = max(1, state_tokens)
    while len(chosen) < MOST and prompt_length - distance > start:
        if all(abs(prompt_length - distance - other) >= apart for other in (start, *chosen)):
            chosen.append(prompt_length - distance)
        distance *= 2
    return sorted(chosen[:MOST])


def surplus(path: Sequence[Checkpoint], spared: Container[int], state_tokens: int) -> list[int]:
    """Positions of a path's states that are not worth their bytes, by coverage and not by age.

    The deepest `RECENT`, the first anchor (the end of system and tools, which other sessions share), the
    latest `ANCHORS` (starts of turns) and the `spared` positions stay. Another goes if the gap that it leaves
    is shorter than `state_tokens`, or than the way from there to the end: who comes back into the gap
    computes no more than what lay behind it. So distances double, and go on doing so as the path grows.
    """
    states = sorted(path, key=lambda kept: -kept.position)
    anchors = [kept.position for kept in states if kept.anchor]
    anchors = anchors[:ANCHORS] + anchors[-1:]
    places = [kept.position for kept in states]
    gone: list[int] = []
    end = deeper = places[0] if places else 0
    for rank, (position, shallower) in enumerate(pairwise([*places, 0])):
        gap = deeper - shallower < max(state_tokens, end - deeper)
        if gap and rank >= RECENT and position not in anchors and position not in spared:
            gone.append(position)
        else:
            deeper = position
    return gone
