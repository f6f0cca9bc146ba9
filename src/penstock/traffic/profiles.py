"""Traffic profiles: seeded lists of requests, one JSON object a line, the same on every machine.

A profile says what sessions ask for in tokens, never in text: `words` makes the text of a block from its
name, so that equal blocks are equal bytes and shared prefixes are really shared. Pure: no clock, no I/O.
Invariant: equal arguments give equal events, other seeds share no block; a session's events are in order.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

Piece = tuple[str, int]
"""A block's name, and how many tokens of it."""
Pieces = tuple[Piece, ...]
_WORDS = [a + b for a, b in product("bcdfghjklmnprstvwz", "aeiou")]
_SPREAD_90 = 1.2816
"""Standard deviations from a lognormal's median to its 90th percentile."""
LONGEST_PAUSE = 2.0
"""Seconds; people and tools of whom the sources tell take longer, and nothing happens meanwhile."""


@dataclass(frozen=True, slots=True)
class Event:
    """One request of a session. Lengths in tokens, times in seconds."""

    session: int
    turn: int
    pause: float
    """After the answer before, or after the start."""
    system: Pieces
    """The system prompt; that of a session's first turn holds for all of them."""
    text: Pieces
    """What this turn adds."""
    answer: int
    """The most that is asked for."""
    kind: str = "chat"
    """chat, title (a small chat beside another), fim (a completion), count (counts the text's tokens)."""
    strip: bool = False
    """The client drops the first half of each earlier answer, as clients do with a model's thinking."""
    summary: Pieces = ()
    """The client puts this in the place of its history, but for the last two messages."""
    leave_in_prefill: float | None = None
    """The client hangs up at this share of the time that it expects the prompt to take."""
    leave_after: int | None = None
    """The client hangs up when it has had this many pieces of the answer."""
    leave_at: float | None = None
    """The client hangs up at this time after it asked."""
    back_after: float | None = None
    """After hanging up it sends the same request again; None: it does not."""
    back_streams: bool = True


def words(block: str, count: int) -> str:
    """The text of a block: `count` words of two letters, most tokenizers' shortest single tokens."""
    draw = random.Random(block)
    return " ".join(draw.choices(_WORDS, k=max(1, count)))


def issue1390(
    seed: int = 0, scale: float = 1.0, sessions: int = 10, first_prompt: tuple[int, int] = (55_000, 64_000)
) -> list[Event]:
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
            first = draw.uniform(*first_prompt) * scale - shared
            added, answer = _step(draw, scale)
            mood, where, pieces = draw.random(), draw.uniform(0.1, 0.9), draw.uniform(5, 200)
            left, back = mood < 0.5, draw.random() < 0.8
            later, streams = draw.uniform(0.1, 1.0), draw.random() < 0.5
            event = Event(
                session=session,
                turn=turn,
                pause=draw.uniform(0.0, 2.0),
                system=((f"{seed} system", shared),),
                text=((f"{seed} {session} {turn}", added if turn else max(1, round(first))),),
                answer=answer,
                leave_in_prefill=where if mood < 0.3 else None,
                leave_after=max(1, round(pieces * scale)) if 0.3 <= mood < 0.5 else None,
                back_after=later if left and back else None,
                back_streams=streams,
            )
            events.append(event)
    return events


def agent(seed: int = 0, scale: float = 1.0, sessions: int = 10, drift: bool = False) -> list[Event]:
    """Coding agents that nobody hangs up on, with published figures (TraceLab).

    18,000 tokens of system prompt and tools; a median of 15 steps (40 at most), each adding a median of 875
    tokens (90th percentile 6,000); answers with median 214; a step in nine is a person's, the others tools'.

    `drift`: what breaks prefixes in practice. A line of its own opens each session's system prompt, a third
    of the sessions list their tools in another order, a person's turn drops the thinking from the history,
    and histories beyond 100,000 tokens are compacted to a fifth.
    """
    draw = random.Random(f"agent {seed}")
    events: list[Event] = []
    for session in range(sessions):
        system = [(f"{seed} tool {number}", _scaled(3_000, scale)) for number in range(6)]
        if drift and draw.random() < 1 / 3:
            draw.shuffle(system)
        if drift:
            system.insert(0, (f"{seed} {session} line", 24))
        steps = min(40, max(3, round(draw.lognormvariate(math.log(15), math.log(9) / _SPREAD_90))))
        events += _session(draw, seed, session, steps, tuple(system), scale, drift)
    return events


def fanout(seed: int = 0, scale: float = 1.0, sessions: int = 21) -> list[Event]:
    """A parent and its sub-agents, all at the same moment: 11,000 tokens in common, 8 to 20 steps each."""
    draw = random.Random(f"fanout {seed}")
    system = ((f"{seed} system", _scaled(11_000, scale)),)
    events: list[Event] = []
    for session in range(sessions):
        events += _session(draw, seed, session, draw.randint(8, 20), system, scale, False)
    return events


def chatty(seed: int = 0, scale: float = 1.0, sessions: int = 1) -> list[Event]:
    """Agents at 60,000 tokens, and around each all the small requests that editors and chats send.

    A title and tags at the start; twice 16 token counts at once; a completion for every keystroke, five a
    second, each given up when the next one comes.
    """
    draw = random.Random(f"chatty {seed}")
    system = ((f"{seed} system", _scaled(60_000, scale)),)
    events: list[Event] = []
    for at in range(0, 100 * sessions, 100):
        events += _session(draw, seed, at, 8, system, scale, False)
        task, file = (f"{seed} {at} 0", 300), (f"{seed} {at} file", 1_500)
        for n in range(2):
            events.append(Event(at + 1 + n, 0, 0.2, (), ((f"{seed} title {n}", 200), task), 24, "title"))
        for n in range(32):
            events.append(
                Event(at + 10 + n, 0, 1.0 + n // 16 * 4, (), ((f"{seed} tool {n % 16}", 500),), 1, "count")
            )
        for n in range(40):
            typed = file, (f"{seed} {at} typed", 1 + n)
            events.append(Event(at + 50, n, 0.0, (), typed, 24, "fim", leave_at=0.2))
    return events


PROFILES: dict[str, Callable[..., list[Event]]] = {
    "issue1390": issue1390,
    "agent": agent,
    "fanout": fanout,
    "chatty": chatty,
    "drift": partial(agent, drift=True),
    "storm": partial(issue1390, sessions=6, first_prompt=(18_000, 90_000)),
}


def to_lines(events: Iterable[Event]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(event)) + "\n" for event in events)


def _session(
    draw: random.Random, seed: int, session: int, steps: int, system: Pieces, scale: float, drift: bool
) -> Iterator[Event]:
    """An agent's steps, one after the other."""
    held = 0
    for turn in range(steps):
        person = turn == 0 or draw.random() < 1 / 9
        added, answer = _step(draw, scale)
        pause = min(draw.lognormvariate(math.log(84 if person else 0.3), 2.0), LONGEST_PAUSE)
        name = f"{seed} {session} {turn}"
        if compacts := drift and held > 100_000 * scale:
            held //= 5
        summary = ((f"{name} summary", held),) if compacts else ()
        said, strip = ((name, added),), drift and person and turn > 0
        yield Event(session, turn, pause if turn else 0.0, system, said, answer, strip=strip, summary=summary)
        held += added + answer


def _step(draw: random.Random, scale: float) -> tuple[int, int]:
    """Tokens that a turn adds, and that are asked for: medians 875 and 214."""
    added = draw.lognormvariate(math.log(875), math.log(6000 / 875) / _SPREAD_90)
    answer = draw.lognormvariate(math.log(214), 0.8)
    return _scaled(min(added, 20_000), scale), max(4, _scaled(min(answer, 2_000), scale))


def _scaled(length: float, scale: float) -> int:
    return max(1, round(length * scale))
