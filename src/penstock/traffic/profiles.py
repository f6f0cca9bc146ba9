"""Traffic profiles: seeded lists of requests, one JSON object a line, the same on every machine.

A profile says what sessions ask for in tokens, never in text: `words` makes the text of a block from its
number, so that equal blocks are equal bytes and shared prefixes are really shared. Pure: no clock, no I/O.
Invariant: equal arguments give equal events; a session's events are in order of `turn`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product

SYSTEM = 0
"""The number of the block that all sessions share."""
_WORDS = [a + b for a, b in product("bcdfghjklmnprstvwz", "aeiou")]


@dataclass(frozen=True, slots=True)
class Event:
    """One request of a session. Lengths in tokens, times in seconds."""

    session: int
    turn: int
    pause: float
    """After the answer before, or after the start."""
    shared: int
    """Of the system prompt, which all sessions share; the same in all turns of a session."""
    block: int
    """The number of this turn's own text."""
    new: int
    """Length of this turn's own text."""
    answer: int
    """The most that is asked for."""
    leave_in_prefill: float | None = None
    """The client hangs up at this share of the time that it expects the prompt to take."""
    leave_after: int | None = None
    """The client hangs up when it has had this many pieces of the answer."""
    back_after: float | None = None
    """After hanging up it sends the same request again; None: it does not."""
    back_streams: bool = True


def words(block: int, count: int) -> str:
    """The text of a block: `count` words of two letters, most tokenizers' shortest single tokens."""
    draw = random.Random(block)
    return " ".join(draw.choices(_WORDS, k=max(1, count)))


def issue1390(seed: int = 0, scale: float = 1.0, sessions: int = 10) -> list[Event]:
    """A coding agent's sessions, as in the report that this server was written for.

    First prompts of 55,000 to 64,000 tokens, of which 10,000 to 18,000 are everybody's system prompt and
    tools; 3 to 6 turns, each adding a lognormal length with median 875 and 90th percentile 6,000; answers
    with median 214. 30 % of the requests are hung up on in prefill, 20 % in mid-stream; 80 % of these come
    back within a second, half of them without a stream. `scale` multiplies all lengths.
    """
    draw = random.Random(f"issue1390 {seed}")
    shared = _scaled(draw.uniform(10_000, 18_000), scale)
    events = []
    for session in range(sessions):
        for turn in range(draw.randint(3, 6)):
            first = draw.uniform(55_000, 64_000) * scale - shared
            added = draw.lognormvariate(math.log(875), math.log(6000 / 875) / 1.2816)
            answer = draw.lognormvariate(math.log(214), 0.8)
            mood, where, pieces = draw.random(), draw.uniform(0.1, 0.9), draw.uniform(5, 200)
            left, back = mood < 0.5, draw.random() < 0.8
            later, streams = draw.uniform(0.1, 1.0), draw.random() < 0.5
            events.append(
                Event(
                    session=session,
                    turn=turn,
                    pause=draw.uniform(0.0, 2.0),
                    shared=shared,
                    block=1 + (seed * 1000 + session) * 100 + turn,
                    new=max(1, round(first)) if turn == 0 else _scaled(min(added, 20_000), scale),
                    answer=max(4, _scaled(min(answer, 2000), scale)),
                    leave_in_prefill=where if mood < 0.3 else None,
                    leave_after=max(1, round(pieces * scale)) if 0.3 <= mood < 0.5 else None,
                    back_after=later if left and back else None,
                    back_streams=streams,
                )
            )
    return events


def to_lines(events: Iterable[Event]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(event)) + "\n" for event in events)


def _scaled(length: float, scale: float) -> int:
    return max(1, round(length * scale))
