"""Any history of requests, cancels, cuts, lies and lags ends empty and in bounded time, and refuses nothing.

How many steps everything takes once traffic and budget rest. Call the time during which the same row is the
oldest on board an epoch. That row is never preempted; each step draws its next id, or has a chunk, and at
least every second chunk is its own, of 256 ids or its rest. So an epoch of sequence i has at most

    S_i = 2 · (⌈known ids ÷ 256⌉ + 1) + ids still to draw + 3   steps,

and ends when the row ends, or when an older sequence comes on board. The latter can happen n - 1 times
between two ends, because the oldest on board gets older each time. So n sequences end within n² · max S_i.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from tests.stateful.counting_engine import FACTS, WEIGHTS, CountingEngine

from penstock.engine import sequence
from penstock.memory import costs
from penstock.memory.costs import Fit
from penstock.memory.ledger import Account

STEPS = 100_000
CONTEXT = 4_000
LEAST = 1_200
"""Ids of the longest sequence that the smallest of the engines can hold."""
STATES = ["queued", "admitted", "in prefill", "decoding", "in flight", "preempted"]

seen: Counter[str] = Counter()
worst = {"share of the bound": 0.0}


@pytest.fixture(autouse=True)
def rows_grow_early(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sequence, "FIRST_ROOM", 48)
    monkeypatch.setattr(costs, "GROWTH", 32)
    seen.clear()
    yield
    print("\n", dict(seen), worst)


def steps_within(engine: CountingEngine) -> int:
    """The bound at the head of this module."""
    most = 0
    for s in engine.sequences.values():
        stop = min(s.limit - s.prompt_length, engine.lives[s.id].stop)
        to_draw = s.prompt_length + stop - len(s.tokens)
        most = max(most, 2 * (math.ceil((len(s.tokens) + to_draw) / 256) + 1) + to_draw + 3)
    return len(engine.sequences) ** 2 * most


def admitted(engine: CountingEngine, lengths: list[int]) -> list[int]:
    """Capacities of the rows that an idle engine gives to these at once; 0: it waits or is refused."""
    ids = [engine.submit(length, max_tokens=40) for length in lengths]
    engine.plan()
    rows = [0 if id_ not in engine.sequences else engine.sequences[id_].capacity for id_ in ids]
    for id_ in ids:
        if id_ in engine.sequences:
            engine.end(id_, "cut")
    return rows


class EngineMachine(RuleBasedStateMachine):
    """What clients, the system and the measurements can do to an engine, in any order."""

    @initialize(
        share=st.sampled_from([1.0, 1.1, 1.3, 2.0]),
        decode=st.integers(1, 8),
        prompts=st.integers(1, 3),
        caching=st.booleans(),
        hits=st.booleans(),
    )
    def start(self, share: float, decode: int, prompts: int, caching: bool, hits: bool) -> None:
        room = int(share * Fit(FACTS.costs, FACTS.transient).alone(LEAST))
        facts = replace(FACTS, decode_concurrency=decode, prompt_concurrency=prompts, chunk_longest=1024)
        self.lied = 1.0
        self.made = lambda: CountingEngine(
            WEIGHTS + room, facts, context=CONTEXT, caching=caching, hits=hits, lie=lambda: self.lied
        )
        self.engine = self.made()

    @rule(
        length=st.integers(1, 300) | st.integers(200, LEAST),
        max_tokens=st.sampled_from([1, 30, 400, 10**9, None]),
        stop=st.sampled_from([1, 60, 300, 700]),
        count=st.integers(1, 3),
    )
    def submit(self, length: int, max_tokens: int | None, stop: int, count: int) -> None:
        for _ in range(count):
            if self.engine.accepts(length) and len(self.engine.sequences) < 12:
                self.engine.submit(length, max_tokens, stop)

    @rule(state=st.sampled_from([*STATES, "preempted", "preempted"]))
    def cancel(self, state: str) -> None:
        """The first that is found in this state within some turns."""
        engine = self.engine
        engine.set_budget(engine.accounts.ledger.held * 6 // 10 if state == "preempted" else engine.ceiling)
        engine.cancel_next = state
        for _ in range(15):
            if engine.cancel_next:
                engine.turn()

    @rule(share=st.sampled_from([0.4, 0.6, 0.8, 0.9, 0.97]))
    def cut_into_what_is_held(self, share: float) -> None:
        self.engine.set_budget(int(share * self.engine.accounts.ledger.held))

    @rule(share=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.95, 1.0, 1.0]))
    def set_budget(self, share: float) -> None:
        self.engine.set_budget(int(share * self.engine.ceiling))

    @rule(size=st.integers(1, 800_000))
    def cached_bytes_come(self, size: int) -> None:
        lease = self.engine.accounts.ledger.reserve(Account.CACHED, size, 4)
        if lease is not None:
            self.engine.cached[-1 - seen["cached"]] = lease, 0
            seen["cached"] += 1

    @rule(size=st.integers(1, 800_000))
    def cached_bytes_go(self, size: int) -> None:
        self.engine._evict(size)

    @rule(speed=st.sampled_from([None, 1e-6, 1e-3, 1.0]), factor=st.sampled_from([1.0, 1.3, 8.0]))
    def measurements_lag(self, speed: float | None, factor: float) -> None:
        self.engine.facts = replace(self.engine.facts, seconds_per_prefill_id=speed)
        self.engine.correction.factor = factor

    @rule(lied=st.sampled_from([0.0, 0.7, 1.0, 1.5, 4.0]))
    def predictor_lies(self, lied: float) -> None:
        self.lied = lied

    @rule(count=st.integers(1, 120))
    def turns(self, count: int) -> None:
        for _ in range(count):
            self.engine.turn()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine, fresh = self.engine, self.made()
        engine.set_budget(engine.ceiling)
        engine.cancel_next = ""
        bound, before = steps_within(engine), engine.steps
        engine.play(2 * bound + 4)
        assert engine.steps - before <= bound
        for lengths in ([engine.longest - 1], [engine.longest + 1_000], [700, 1_400, 50, 900]):
            assert admitted(engine, lengths) == admitted(fresh, lengths), "a fresh engine would do otherwise"
        engine.close()
        assert all(
            life.ended in ("stop", "length", "cut") or not engine.accepts(life.prompt)
            for life in engine.lives.values()
        )
        if bound:
            worst["share of the bound"] = max(worst["share of the bound"], (engine.steps - before) / bound)
        seen.update(engine.wide)
        seen["steps"] += engine.steps


def test_any_history_ends_empty_and_in_bounded_time() -> None:
    chosen = settings(
        max_examples=60,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=False,  # Hypothesis would play the same 60 each time where it sees a CI
    )
    for _ in range(12):
        if seen["steps"] >= STEPS and all(seen[f"cancelled {state}"] >= 20 for state in STATES):
            break
        run_state_machine_as_test(EngineMachine, settings=chosen)
    assert seen["steps"] >= STEPS
    for state in STATES:
        assert seen[f"cancelled {state}"] >= 20, state
    for what in ("Admit", "ClearPool", "Evict", "Preempt", "passed", "grown", "cut", "rise"):
        assert seen[what] >= 50, what
