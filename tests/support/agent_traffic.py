"""Traffic profiles as ids, and how much of them a prefix tree saves, against a policy with foresight.

A message is OPEN, its ids, CLOSE; an answer's first half is its thinking, which clients drop where the
profile says so. Sessions come and go, a few at a time, and take turns in bursts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from random import Random
from typing import Any

from penstock.cache.checkpoints import differs, positions
from penstock.cache.nodes import Checkpoint, Cover, Segment
from penstock.cache.tree import Tree
from penstock.cache.value import previous
from penstock.traffic.profiles import Event, Piece

OPEN, CLOSE = 1, 2
STATE = 1_500
"""Ids whose K/V is as big as a state."""


@dataclass
class Request:
    """What one turn sends and gets. `borders`: where messages begin; the last is the generation prompt's."""

    prompt: array[int]
    answer: array[int]
    borders: list[int]
    turn: int


Message = tuple[list[int], list[int]]
"""Its thinking, and the rest of its ids."""


def requests(
    events: Sequence[Event], count: int | None = None, live: int = 10, switch: float = 1.0, seed: int = 0
) -> list[Request]:
    """The first `count` turns of a profile's sessions, nobody hanging up.

    `live` sessions at a time; after a turn comes another session's with the chance `switch`.
    """
    random = Random(seed)
    waiting = [list(turns) for _, turns in groupby(events, attrgetter("session"))]
    sessions = {
        event.session: Session([OPEN, *ids(event.system), CLOSE]) for event in events if not event.turn
    }
    made: list[Request] = []
    current: list[Event] = []
    while waiting and (count is None or len(made) < count):
        if not current or random.random() < switch:
            current = random.choice(waiting[:live])
        event = current.pop(0)
        if not current:
            waiting.remove(current)
        made.append(sessions[event.session].turn(event))
    return made


@dataclass
class Session:
    """A conversation as its client sends it."""

    system: list[int]
    history: list[Message] = field(default_factory=list)
    since_person: int = 0
    """Which message of the history answers a person first."""

    def turn(self, event: Event) -> Request:
        if event.strip:
            self.history = [([], rest) for _, rest in self.history]
        if event.summary:
            self.history = [([], [*ids(event.summary), CLOSE]), *self.history[-2:]]
        if event.strip or not event.turn:
            self.since_person = len(self.history) + 1
        self.history.append(([], [*ids(event.text), CLOSE]))
        prompt = list(self.system)
        borders, turn = [], 0
        for index, (thought, rest) in enumerate(self.history):
            borders.append(len(prompt))
            if index == self.since_person:
                turn = len(prompt) + 1
            prompt += [OPEN, *thought, *rest]
        borders.append(len(prompt))
        answer = ids([(f"answer to {event.text[0][0]}", event.answer)])
        thought, rest = answer[: len(answer) // 2], [*answer[len(answer) // 2 :], CLOSE]
        self.history.append((thought, rest))
        return Request(
            array("I", [*prompt, OPEN]), array("I", [*thought, *rest]), borders, turn or len(prompt)
        )


def ids(pieces: Sequence[Piece]) -> list[int]:
    return [id_ for block, count in pieces for id_ in Random(block).choices(range(10, 50_000), k=count)]


@dataclass
class Outcome:
    cached: int = 0
    prompts: int = 0
    stored: int = 0


def serve(requests: list[Request], tree: Tree, oracle: Oracle | None = None) -> Outcome:
    """Every request in turn, as a store would: match, prefill with checkpoints, decode, keep the ids."""
    done = Outcome()
    for now, request in enumerate(requests):
        match = tree.match("", request.prompt[:-1])
        start = match.usable
        tree.unpin(tree.pin(match, now), now)
        done.cached += start
        done.prompts += len(request.prompt)
        row = tree.lend("", None)
        whole = request.prompt + request.answer[:-1]
        extend(tree, row, whole, now)
        if tree.stateful:
            parted = match.length if match.why != "whole" and match.length > start else None
            for place in positions(len(request.prompt), request.borders, start, parted, STATE, request.turn):
                anchor = place in (request.turn, request.borders[0])
                tree.keep(row, place, (now, place), STATE, now, anchor)
            tree.keep(row, len(whole), (now, len(whole)), STATE, now)
        if oracle is not None:
            oracle.now = now
        tree.drop(row, now, [((now, at), count, count) for at, count in tree.unpacked(row)])
        done.stored = max(done.stored, tree.bytes)
    return done


def extend(tree: Tree, row: Cover, ids: array[int], now: int) -> None:
    while (cut := tree.extend(row, ids[row.length :], now)) is not None:
        halves = cut.at, cut.segment.end - cut.segment.start - cut.at
        origin = cut.segment.handle[0]
        tree.cut(cut, ((origin, 0), halves[0]), ((origin, 0), halves[1]), now)


class Oracle:
    """Knows when each prefix will be wanted next: the farthest goes first (Belady), by saving and bytes."""

    def __init__(self, requests: list[Request]) -> None:
        self.now = 0
        wholes = [request.prompt + request.answer for request in requests]
        self.shared = [
            [
                differs(whole, request.prompt) if later > origin else 0
                for later, request in enumerate(requests)
            ]
            for origin, whole in enumerate(wholes)
        ]

    def wait(self, origin: int, position: int) -> float:
        later = range(self.now + 1, len(self.shared))
        found = next((r for r in later if self.shared[origin][r] >= position), None)
        return float("inf") if found is None else found - self.now

    def worth(self, tree: Tree, victim: Any) -> float | None:
        node, what = victim
        if what is None:
            if node not in tree._leaves or not node.segments or node.covers:
                return None
            segment: Segment = node.segments[-1]
            if not tree.stateful:
                return 1 / self.wait(segment.handle[0], segment.start + 1)
            last = node.deepest(node.end)
            if last is None or segment.start >= last.position:
                return 0.0
            base = previous(node, last.position)
            size = last.size + sum(s.size for s in node.segments if s.end > base)
            return (last.position - base) / size / self.wait(last.handle[0], last.position)
        if not isinstance(what, Checkpoint) or node.checkpoints.get(what.position) is not what:
            return None
        saved = what.position - previous(node, what.position)
        return saved / what.size / self.wait_for_just(node, what)

    def wait_for_just(self, node: Any, kept: Checkpoint) -> float:
        """Until a request comes back to this checkpoint and reaches none that is deeper in its node."""
        deeper = min((p for p in node.checkpoints if p > kept.position), default=1 << 60)
        shared = self.shared[kept.handle[0]]
        later = range(self.now + 1, len(shared))
        found = next((r for r in later if kept.position <= shared[r] < deeper), None)
        return float("inf") if found is None else found - self.now


class OracleTree(Tree):
    """The same tree under the oracle's eviction."""

    oracle: Oracle

    def _worth(self, victim: Any, now: float) -> float | None:
        return self.oracle.worth(self, victim)

    def _thin(self, cover: Cover, freed: list[Any]) -> None:
        """Keeps all until bytes are short."""
