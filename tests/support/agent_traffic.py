"""Agents' traffic as ids, and how much of it a prefix tree saves, against a policy that knows the future.

Lengths at the median: 875 ids appended and 214 generated a turn. Sessions come and go and take turns in
bursts; sub-agents share their parent's system prompt. With `drift`, some sessions order their tools in
another way, users' turns strip the thinking from the history, and long histories are compacted.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import groupby
from random import Random
from typing import Any

from penstock.cache.checkpoints import differs, positions
from penstock.cache.nodes import Checkpoint, Cover, Segment
from penstock.cache.tree import Tree
from penstock.cache.value import previous
from penstock.traffic.profiles import SYSTEM, Event, issue1390

OPEN, THINK, CLOSE = 1, 2, 3
STATE = 1_500
"""Ids whose K/V is as big as a state."""


@dataclass
class Request:
    """What one turn sends and gets. `borders`: where messages begin; the last is the generation prompt's."""

    prompt: array[int]
    answer: array[int]
    borders: list[int]
    turn: int


@dataclass
class Session:
    """A conversation: messages as (ids without thinking, thinking), and how many turns are left."""

    system: list[int]
    left: int
    history: list[tuple[list[int], list[int]]] = field(default_factory=list)
    since_user: int = 0


class Traffic:
    def __init__(self, seed: int, drift: bool = False, live: int = 4, switch: float = 0.25) -> None:
        self.random = Random(seed)
        self.drift, self.sessions, self.switch = drift, live, switch
        self.base = self.words(3_000)
        self.tools = [self.words(1_000) for _ in range(6)]
        self.live = [self.session() for _ in range(live)]

    def words(self, count: int) -> list[int]:
        return [self.random.randrange(10, 50_000) for _ in range(count)]

    def length(self, median: int) -> int:
        return max(8, int(self.random.lognormvariate(0, 0.8) * median))

    def session(self, system: list[int] | None = None, left: int | None = None) -> Session:
        if system is None:
            tools = list(self.tools)
            if self.drift and self.random.random() < 0.3:
                self.random.shuffle(tools)
            system = [OPEN, *self.base, *(token for tool in tools for token in tool), CLOSE]
        turns = 3 + int(self.random.paretovariate(1.1) * 4)
        return Session(system, min(40, turns) if left is None else left)

    def requests(self, count: int) -> list[Request]:
        made: list[Request] = []
        current = self.live[0]
        while len(made) < count:
            if current not in self.live or self.random.random() < self.switch:
                current = self.random.choice(self.live)
            made.append(self.turn(current))
            if self.random.random() < 0.04:
                self.live.append(self.session(current.system, self.random.randrange(3, 10)))
            if current.left <= 0:
                self.live.remove(current)
                if len(self.live) < self.sessions:
                    self.live.append(self.session())
        return made

    def turn(self, session: Session) -> Request:
        session.left -= 1
        from_user = not session.history or self.random.random() < 0.15
        if from_user and self.drift:
            session.history = [(body, []) for body, _ in session.history]
        length = sum(len(body) + len(thought) for body, thought in session.history)
        if self.drift and length > 30_000:
            session.history = [([OPEN, *self.words(1_500), CLOSE], []), *session.history[-2:]]
        if from_user:
            session.since_user = len(session.history) + 1
        session.history.append(([OPEN, *self.words(self.length(875)), CLOSE], []))
        prompt = list(session.system)
        borders, turn = [], 0
        for index, (body, thought) in enumerate(session.history):
            borders.append(len(prompt))
            if index == session.since_user:
                turn = len(prompt) + 1
            prompt += [body[0], *thought, *body[1:]]
        borders.append(len(prompt))
        prompt += [OPEN]
        thought = [THINK, *self.words(self.length(100))] if self.drift else []
        body = [OPEN, *self.words(self.length(214 - (100 if self.drift else 0))), CLOSE]
        session.history.append((body, thought))
        return Request(array("I", prompt), array("I", [*thought, *body[1:]]), borders, turn or len(prompt))


def report(
    seed: int = 0, scale: float = 1.0, sessions: int = 10, live: int = 10, switch: float = 1.0
) -> list[Request]:
    """The profile issue1390 as ids, nobody hanging up; sessions take turns as in `Traffic`."""
    random = Random(seed)
    waiting = [list(turns) for _, turns in groupby(issue1390(seed, scale, sessions), lambda e: e.session)]
    histories: dict[int, list[list[int]]] = {index: [] for index in range(sessions)}
    made: list[Request] = []
    current: list[Event] = []
    while waiting:
        if not current or random.random() < switch:
            current = random.choice(waiting[:live])
        event = current.pop(0)
        if not current:
            waiting.remove(current)
        history = histories[event.session]
        history.append([OPEN, *_block(event.block, event.new), CLOSE])
        prompt, borders = [OPEN, *_block(SYSTEM, event.shared), CLOSE], []
        for message in history:
            borders.append(len(prompt))
            prompt += message
        borders.append(len(prompt))
        answer = [*_block(-event.block, event.answer), CLOSE]
        history.append([OPEN, *answer])
        made.append(Request(array("I", [*prompt, OPEN]), array("I", answer), borders, len(prompt)))
    return made


def _block(number: int, count: int) -> list[int]:
    return Random(number).choices(range(10, 50_000), k=count)


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
