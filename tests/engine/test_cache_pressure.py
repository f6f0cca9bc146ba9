"""The report's traffic, scaled down, through a whole engine: what waits, what is evicted, what is stored.

Bytes are real ones, of `mx.get_array_buffer_size`; who waits is judged anew at every decision, apart from the
scheduler's own arithmetic.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import pytest
from tests.support import tiny_models
from tests.support.engine_loop import EngineLoop
from tests.support.laws import live_buffers

from penstock import wire
from penstock.cache import store
from penstock.cache.checkpoints import differs
from penstock.cache.nodes import below
from penstock.cache.tree import Tree
from penstock.engine import loop as loop_module
from penstock.engine.batch import Runner
from penstock.engine.scheduler import Facts, GiveUp, Measure, Plan, Preempt, Room, schedule
from penstock.engine.sequence import Sequence
from penstock.traffic.profiles import Event, Piece, issue1390

SAMPLING = wire.Sampling(temperature=1.0, seed=7)


def ids(pieces: Iterable[Piece]) -> list[int]:
    return [id_ for block, count in pieces for id_ in random.Random(block).choices(range(256), k=count)]


class Report:
    """The profile issue1390 against an engine: sessions side by side, a turn after the answer before it."""

    def __init__(self, engine: EngineLoop, events: list[Event], live: int) -> None:
        self.engine, self.live = engine, live
        self.waiting: dict[int, list[Event]] = {}
        for event in events:
            self.waiting.setdefault(event.session, []).append(event)
        self.histories: dict[int, list[list[int]]] = {}
        self.open: dict[int, tuple[int, list[int], Event | None]] = {}
        self.sent: list[list[int]] = []
        self.shared = len(ids(events[0].system))

    def play(self, each: Callable[[], None] = lambda: None) -> None:
        while self.waiting or self.open:
            busy = [session for session, *_ in self.open.values()]
            for session in [s for s in list(self.waiting)[: self.live] if s not in busy]:
                self.send(session, self.waiting[session].pop(0))
            self.engine.turn()
            each()
            for id_ in list(self.open):
                self.look(id_)

    def send(self, session: int, event: Event) -> None:
        history = self.histories.setdefault(session, [ids(event.system)])
        history.append(ids(event.text))
        self.submit(session, event)

    def submit(self, session: int, event: Event, again: bool = False) -> None:
        history = self.histories[session]
        starts = [sum(map(len, history[:at])) for at in range(1, len(history))]
        prompt = [id_ for message in history for id_ in message]
        borders = [*starts, len(prompt) - 1]
        id_ = self.engine.submit(prompt, max_tokens=event.answer, borders=borders, sampling=SAMPLING)
        self.open[id_] = session, prompt, None if again else event
        self.sent.append(prompt)

    def look(self, id_: int) -> None:
        """Hang up where the profile does; after an answer, or the retry of a request, the session goes on."""
        session, prompt, event = self.open[id_]
        answer = self.engine.answers[id_]
        if event is not None and answer.ended is None:
            done = answer.prefilled[-1] / len(prompt) if answer.prefilled else 0
            if done >= (event.leave_in_prefill or 2) or len(answer.tokens) >= (event.leave_after or 1 << 30):
                self.engine.end(id_, keep=len(prompt) + len(answer.tokens))
        if answer.ended is None:
            return
        assert answer.ended.reason in ("stop", "length", "cut"), answer.ended
        del self.open[id_]
        self.sent[self.sent.index(prompt)] = prompt + answer.tokens
        if answer.ended.reason == "cut" and event is not None and event.back_after is not None:
            self.submit(session, event, again=True)
            return
        self.histories[session].append(answer.tokens)
        if not self.waiting[session]:
            del self.waiting[session]

    @property
    def unique(self) -> int:
        """Ids of a tree of all that was sent and answered so far."""
        every = sorted(self.sent)
        return sum(map(len, every)) - sum(differs(one, two) for one, two in pairwise(every))


class Judge:
    """In the scheduler's place: asks it, and finds whether bytes that could go keep anyone waiting.

    Those that were used just now may, while a prompt that is on board has less to prefill.
    """

    def __init__(self, engine: EngineLoop) -> None:
        self.engine = engine
        self.waits = self.rounds = 0

    def __call__(self, sequences: Iterable[Sequence], facts: Facts, room: Room) -> Plan | Measure:
        every = list(sequences)
        decision = schedule(every, facts, room)
        self.rounds += 1
        if isinstance(decision, Preempt | GiveUp) and self.engine.loop.in_flight is None:  # else asked again
            assert room.evictable == room.pool == 0, "a row goes while cached bytes could"
        aboard = [s for s in every if s.row is not None]
        waiting = sorted((s for s in every if s.row is None), key=lambda s: s.arrival)
        if isinstance(decision, Plan) and waiting and len(aboard) < facts.decode_concurrency:
            self.judge(decision, waiting[0], aboard, facts, room)
        return decision

    def judge(self, plan: Plan, first: Sequence, aboard: list[Sequence], facts: Facts, room: Room) -> None:
        if sum(s.prefill_left > 0 for s in aboard) >= facts.prompt_concurrency:
            return
        if aboard and not first.may_return(facts.departures):
            return  # it comes back when rows have left, whatever is free
        costs = facts.costs
        step = plan.transient + sum(costs.growth(s.capacity, new) for s, new in plan.grow)
        needed = costs.row(first.first_capacity) + costs.states
        if first.preempted_at is not None:
            needed += sum(costs.growth(s.capacity, min(s.capacity + max(256, s.capacity // 8), s.limit))
                          for s in aboard)  # fmt: skip
        before = [s.expected_prefill for s in aboard if s.prefill_left]
        next_up = first.expected_prefill < min(before, default=1 << 30)
        cached = room.evictable - (0 if next_up else room.recent)
        assert room.free - step + room.pool + cached < needed, "it could be on board"
        self.waits += 1


def make(name: str, **options: Any) -> EngineLoop:
    options = {"cache_bytes": None, "chunk_longest": 512, **options}
    return EngineLoop(Runner(tiny_models.build(name)), vocab_size=tiny_models.VOCAB, **options)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_nobody_waits_while_cached_bytes_could_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = make(name)
    costs = probe.accounts.costs
    probe.close()
    monkeypatch.setattr("penstock.cache.tree.SEGMENT", 16)  # a prompt has 30 of them; at full scale, 120
    events = issue1390(1, 0.008, 6)
    ceiling = 1_200 * costs.kv_per_token + 5 * costs.row(0)
    engine = make(name, ceiling=ceiling)
    judge, evicted = Judge(engine), 0
    monkeypatch.setattr(loop_module, "schedule", judge)
    evict = engine.cache.tree._evict

    def counted(goal: int, now: float, freed: list[Any]) -> None:
        nonlocal evicted
        before = len(freed)
        evict(goal, now, freed)
        evicted += sum(isinstance(handle, store.Segment) for handle in freed[before:])

    engine.cache.tree._evict = counted  # type: ignore[method-assign]

    def within() -> None:
        assert engine.accounts.ledger.held <= ceiling
        assert real_bytes(engine) <= ceiling + 4 * costs.fixed, (
            "and what is shared of tiny states, and a step in flight replaces"
        )

    report = Report(engine, events, live=4)
    report.play(within)
    print(f"{name}: {len(report.sent)} requests, {evicted} segments evicted, {judge.waits} waits judged, "
          f"{engine.loop.counts['preempt']} preemptions")  # fmt: skip
    assert evicted >= 50
    assert judge.waits >= 20
    assert engine.loop.counts["errors"] == 0
    engine.close()


def cached_arrays(tree: Tree) -> list[mx.array]:
    nodes = [node for root in tree._roots.values() for node in below(root)]
    arrays = [array for node in nodes for segment in node.segments for array in segment.handle.arrays]
    states = [part for node in nodes for kept in node.checkpoints.values() for part in kept.handle.parts]
    return arrays + [x for part in states if part is not None for x in part if x is not None]


def real_bytes(engine: EngineLoop, cached_only: bool = False) -> int:
    """Of all that is cached, adopted, and lives."""
    adopted = [x for row in engine.cache._adopted for leaf in row.kv for x in (leaf.keys, leaf.values)]
    arrays = cached_arrays(engine.cache.tree) + adopted
    return int(mx.get_array_buffer_size(arrays if cached_only else arrays + live_buffers(engine.loop.runner)))


SHAPES = {
    "qwen3": {},
    # A state as large as 60 ids is to prompts of 2,500 as a real one of 1,500 is to 60,000; and it is too
    # large for MLX to let a copy share its source's buffer.
    "qwen3_5": {
        "num_key_value_heads": 4,
        "head_dim": 64,
        "linear_key_head_dim": 48,
        "linear_value_head_dim": 48,
    },
}


@pytest.mark.parametrize(("name", "most"), [("qwen3", 1.10), ("qwen3_5", 1.6)])
def test_every_token_is_stored_once_in_real_bytes(name: str, most: float) -> None:
    runner = Runner(tiny_models.make(tiny_models.config_of(name, **SHAPES[name])))
    engine = EngineLoop(runner, vocab_size=tiny_models.VOCAB, cache_bytes=None, chunk_longest=512)
    events = [replace(e, leave_in_prefill=None, leave_after=None) for e in issue1390(2, 0.042, 4)]
    per_token = engine.accounts.costs.kv_per_token
    with_rows = []

    def step() -> None:
        rows = [s for s in engine.loop.sequences.values() if s.row is not None]
        if rows:
            nodes = [node for root in engine.cache.tree._roots.values() for node in below(root)]
            states = sum(kept.size for node in nodes for kept in node.checkpoints.values())
            live = real_bytes(engine) - states - engine.accounts.costs.fixed * len(rows)
            ids = report.unique + report.shared * (len(rows) - 1)
            with_rows.append(live / per_token / ids)

    with tiny_models.exact_sizes():
        report = Report(engine, events, live=2)
        report.play(step)
        stored = real_bytes(engine, cached_only=True) / per_token / report.unique
    print(f"{name}: stored ÷ unique {stored:.3f}; with rows at most {max(with_rows):.3f}")
    assert stored <= most
    assert max(with_rows) <= 1.15
    engine.close()
