"""Scheduler and accounts alone: a runner that only counts bytes, and a budget that does what it likes."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.accounts import Accounts
from penstock.engine.scheduler import (
    OVERTAKING,
    Admit,
    Chunk,
    ClearPool,
    Evict,
    Facts,
    GiveUp,
    Plan,
    Preempt,
    Room,
    account,
    choose_prompt,
    entry_bytes,
    schedule,
)
from penstock.engine.sequence import Sequence
from penstock.guilt import Accusation
from penstock.memory.costs import CHUNK_FLOOR, FIRST_ROOM, Costs, Fit
from penstock.memory.predict import Scalars, Transient, with_margin
from penstock.wire import Sampling, Submit

COSTS = Costs(kv_per_token=1000, layer_per_token=100, fixed=5_000, states=2_000, buffers=8)
TRANSIENT = Transient(Scalars(10_000, 300, 0.5), Scalars(5_000, 2_000, 0.1))
FACTS = Facts(4, 2, 2048, 0.2, COSTS, TRANSIENT)
PLENTY = Room(free=1 << 40)


def sequence(id_: int, length: int, *, arrival: int | None = None, max_tokens: int | None = 8) -> Sequence:
    prompt = array("I", [7]) * length
    submit = Submit(
        id=id_,
        prompt=prompt.tobytes(),
        sampling=Sampling(),
        arrival=id_ if arrival is None else arrival,
        max_tokens=max_tokens,
    )
    return Sequence(submit, context_length=200_000)


def board(sequence: Sequence, capacity: int | None = None) -> Sequence:
    sequence.row = object()
    sequence.capacity = capacity or sequence.first_capacity
    return sequence


class Simulation:
    """Plays the scheduler's decisions against real accounts; nothing is computed."""

    def __init__(self, budget: int, facts: Facts = FACTS, weights: int = 0) -> None:
        self.accounts = Accounts(budget, weights, facts.costs)
        self.facts = facts
        self.sequences: list[Sequence] = []
        self.computed = 0
        self.gave_up: list[Sequence] = []
        self.measures: list[str] = []
        self.most_on_board = 0
        self.first_rounds = 0

    def decide(self) -> Plan:
        for rounds in range(3 * len(self.sequences) + 5):
            facts = replace(self.facts, departures=self.accounts.departures)
            decision = schedule(self.sequences, facts, self.accounts.room())
            if isinstance(decision, Plan):
                self.first_rounds = max(self.first_rounds, rounds)
                return decision
            self.measures.append(type(decision).__name__)
            self.apply(decision)
        raise AssertionError("the rounds do not end")

    def apply(self, decision: object) -> None:
        match decision:
            case Admit(sequence, capacity):
                self.accounts.admit(sequence, capacity)
                board(sequence, capacity)
            case ClearPool():
                self.accounts.clear_pool()
            case Preempt(sequence):
                on_board = [s for s in self.sequences if s.row is not None]
                assert sequence is not min(on_board, key=lambda s: s.arrival), "the oldest was preempted"
                self.accounts.leave(sequence)
                self.accounts.keep_states(0)
                sequence.preempt(self.accounts.departures)
            case GiveUp(sequence):
                self.leave(sequence)
                self.gave_up.append(sequence)
            case _:
                raise AssertionError(decision)

    def leave(self, sequence: Sequence) -> None:
        self.accounts.leave(sequence)
        self.accounts.keep_states(0)
        self.accounts.departures += 1
        self.sequences.remove(sequence)

    def step(self) -> Plan:
        plan = self.decide()
        for grower, capacity in plan.grow:
            self.accounts.grow(grower, capacity)
            grower.capacity = capacity
        lease = self.accounts.begin(plan.transient)
        for decoded in plan.decode:
            assert decoded.launched + 1 <= decoded.capacity, "a row is written beyond its room"
            decoded.launched += 1
            decoded.tokens.append(7)
            self.computed += 1
        if plan.chunk is not None:
            chosen = plan.chunk.sequence
            assert chosen.launched + plan.chunk.length <= chosen.capacity
            account(plan.chunk, [s for s in self.sequences if s.prefill_left])
            chosen.launched += plan.chunk.length
            self.computed += plan.chunk.length
        self.accounts.ledger.release(lease)
        self.most_on_board = max(self.most_on_board, sum(s.row is not None for s in self.sequences))
        for ended in [s for s in self.sequences if s.row and s.finish_reason(frozenset())]:
            self.leave(ended)
        return plan

    def run(self, steps: int = 100_000) -> None:
        for _ in range(steps):
            if not self.sequences:
                return
            assert self.step() or not self.sequences, "sequences are left, but nothing is planned"
        raise AssertionError("not everything has ended")


@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=12),
    decode=st.integers(1, 5),
    prompts=st.integers(1, 3),
    speed=st.none() | st.floats(1e-6, 1e-2),
    share=st.floats(0.0, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_whatever_is_accepted_ends_within_any_budget_that_holds_the_longest(
    lengths: list[int], decode: int, prompts: int, speed: float | None, share: float
) -> None:
    facts = replace(
        FACTS, decode_concurrency=decode, prompt_concurrency=prompts, seconds_per_prefill_id=speed
    )
    least = Fit(COSTS, TRANSIENT).alone(max(lengths) + 8)
    simulation = Simulation(int(least * (1 + 3 * share)), facts)
    simulation.sequences = [sequence(i, n) for i, n in enumerate(lengths)]
    useful = sum(lengths) + 8 * len(lengths)
    simulation.run()
    assert not simulation.gave_up
    assert simulation.computed <= 3 * useful
    assert simulation.accounts.ledger.held == (
        simulation.accounts._pool.size if simulation.accounts._pool else 0
    )


@pytest.mark.parametrize(
    ("asked", "draw"),
    [
        ({}, 200),
        ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, 200),
        ({"temperature": 0.7, "top_k": 64, "min_p": 0.1, "logprobs": 5}, 200),
        ({"temperature": 0.7, "top_k": 65}, 500),
        ({"temperature": 0.7, "top_p": 0.8}, 500),
        ({"temperature": 0.7}, 500),
        ({"repetition_penalty": 1.1}, 500),
        ({"presence_penalty": 0.5}, 500),
        ({"frequency_penalty": 0.5}, 500),
        ({"logit_bias": {3: 1.0}}, 500),
        ({"temperature": 0.7, "top_k": 20, "xtc_probability": 0.5}, 1_500),
    ],
)
def test_a_row_is_charged_by_how_it_draws(asked: dict[str, Any], draw: int) -> None:
    facts = replace(FACTS, transient=replace(TRANSIENT, usual_draw=500, costly_draw=1_500, lean_draw=200))
    row = board(sequence(1, 50))
    row.sampling = Sampling(**asked)
    row.launched = row.computed = len(row.tokens) - 1
    plan = schedule([row], facts, PLENTY)
    assert isinstance(plan, Plan)
    step = facts.transient.step.peak([(1, row.launched + 1)])
    assert plan.transient == with_margin(step + draw) + COSTS.states


def test_growth_preempts_the_youngest_and_computes_little_twice() -> None:
    """Answers that outgrow what was reserved: every growth is a fight for room."""
    needed = Fit(COSTS, TRANSIENT).alone(9_000)
    simulation = Simulation(int(needed * 1.6), replace(FACTS, decode_concurrency=8))
    simulation.sequences = [sequence(i, 500, max_tokens=8_000) for i in range(6)]
    simulation.run()
    assert simulation.measures.count("Preempt") >= 3
    assert simulation.computed <= 3 * 6 * 8_500
    assert not simulation.gave_up


def test_the_last_row_gives_up_only_at_the_ceiling() -> None:
    simulation = Simulation(Fit(COSTS, TRANSIENT).alone(3_000))
    simulation.sequences = [sequence(0, 1_000, max_tokens=None)]
    simulation.step()
    simulation.accounts.set_budget(COSTS.row(1_500))
    simulation.run()
    assert [s.id for s in simulation.gave_up] == [0]
    assert len(simulation.gave_up[0].tokens) >= 3_000


def test_after_a_cut_nothing_is_taken_on_and_after_the_rise_everything_is() -> None:
    simulation = Simulation(30_000_000)
    simulation.sequences = [sequence(i, 2_000, max_tokens=50) for i in range(3)]
    for _ in range(4):
        simulation.step()
    simulation.accounts.set_budget(3_000_000)
    simulation.sequences += [sequence(10 + i, 2_000) for i in range(3)]
    for _ in range(3):
        simulation.step()
        assert simulation.accounts.ledger.held <= 3_000_000
    simulation.accounts.set_budget(30_000_000)
    simulation.run()
    assert not simulation.gave_up


@pytest.mark.parametrize("k", [1, 2, 5])
def test_with_the_budget_for_k_exactly_k_run_at_once(k: int) -> None:
    budget = Fit(COSTS, TRANSIENT).together(k, 3_000, 200)
    facts = replace(FACTS, decode_concurrency=32, prompt_concurrency=32)
    simulation = Simulation(budget, facts)
    simulation.sequences = [sequence(i, 3_000, max_tokens=200) for i in range(k + 4)]
    simulation.run()
    assert simulation.most_on_board == k
    assert "Preempt" not in simulation.measures


def test_nothing_waits_while_the_pool_or_the_cache_could_give_room() -> None:
    waiting, running = sequence(1, 3_000), board(sequence(0, 100))
    short = Room(free=1_000_000, pool=4_000_000, evictable=4_000_000)
    assert isinstance(schedule([waiting, running], FACTS, short), ClearPool)
    assert isinstance(schedule([waiting, running], FACTS, replace(short, pool=0)), Evict)
    nothing = schedule([waiting, running], FACTS, replace(short, pool=0, evictable=0))
    assert isinstance(nothing, Plan)
    assert nothing.decode or nothing.chunk


def test_cached_bytes_that_are_wanted_go_only_for_a_prompt_that_is_next() -> None:
    """While another is prefilled that has less left it would only hold room; a shorter one goes first."""
    reading = board(sequence(0, 2_000))
    room = Room(free=1_000_000, evictable=4_000_000, recent=3_900_000)
    assert isinstance(schedule([reading, sequence(1, 3_000)], FACTS, room), Plan)
    assert isinstance(schedule([reading, sequence(1, 1_500)], FACTS, room), Evict)
    returning = sequence(1, 3_000)
    returning.found = 2_500
    assert isinstance(schedule([reading, returning], FACTS, room), Evict)
    old = replace(room, recent=0)
    assert isinstance(schedule([reading, sequence(1, 3_000)], FACTS, old), Evict), "nobody misses it"


def test_who_comes_back_to_a_cached_prefix_goes_first_but_not_for_ever() -> None:
    """It saves most of its prefill, and would not if others took its prefix's place."""
    head, returning = sequence(0, 1_000, max_tokens=5_000), sequence(1, 1_000, max_tokens=5_000)
    assert schedule([head, returning], FACTS, PLENTY) == Admit(head, head.first_capacity)
    returning.found = 499
    assert schedule([head, returning], FACTS, PLENTY) == Admit(head, head.first_capacity)
    returning.found = 600
    passed = 0
    while (admit := schedule([head, returning], FACTS, PLENTY)) == Admit(returning, 2_024, past=head):
        admit.book()
        passed += 1
    assert passed == 3
    assert admit == Admit(head, 2_024)


def test_a_row_that_takes_over_its_prefix_needs_that_much_less() -> None:
    waiting = sequence(0, 999, max_tokens=1)
    plain, taking = entry_bytes(waiting, 1_000, FACTS), FACTS.costs.taking(1_000)
    entry = (
        FACTS.costs.row(1_000) + FACTS.costs.states + taking
    )  # a part of the prefix is there twice for a moment
    assert entry > plain
    room = Room(free=entry - 500_000, evictable=500_000)
    assert schedule([waiting], FACTS, room) == Evict(plain - room.free, waiting)
    waiting.reuse = 500_000
    assert schedule([waiting], FACTS, room) == Admit(waiting, 1_000)
    less = replace(room, free=room.free - 1)
    assert schedule([waiting], FACTS, less) == Evict(1, waiting), "what it may not take over may go for it"
    none = replace(room, free=plain - 500_001)
    assert schedule([waiting], FACTS, none) == GiveUp(waiting)


def test_the_order_of_measures_for_a_row_that_must_grow() -> None:
    old, young = board(sequence(0, 1), 1), board(sequence(1, 1), 1)
    for one in (old, young):
        one.limit, one.launched, one.tokens = 5_000, 1, array("I", [7, 7])
    for room, expected in [
        (Room(0, pool=1, evictable=1), ClearPool()),
        (Room(0, evictable=1), Evict),
        (Room(0), Preempt(young)),
    ]:
        decision = schedule([old, young], FACTS, room)
        assert decision == expected or type(decision) is expected
    assert schedule([old], FACTS, Room(0)) == GiveUp(old)


def test_a_preempted_sequence_waits_for_a_departure() -> None:
    running, preempted = board(sequence(0, 100)), sequence(1, 100)
    preempted.preempt(departures=3)
    facts = replace(FACTS, departures=3)
    assert isinstance(schedule([running, preempted], facts, PLENTY), Plan)
    assert schedule([running, preempted], replace(facts, departures=4), PLENTY) == Admit(preempted, 108)
    assert schedule([preempted], facts, PLENTY) == Admit(preempted, 108)
    preempted.preempt(departures=4)
    for departures, expected in [(5, Plan), (6, Admit)]:
        decision = schedule([running, preempted], replace(facts, departures=departures), PLENTY)
        assert isinstance(decision, expected), "the second time it waits for two"


def test_a_chunk_shrinks_to_what_fits_and_no_further_than_the_floor() -> None:
    long = board(sequence(0, 60_000))
    room = Room(TRANSIENT.prefill(700, 0))
    plan = schedule([long], replace(FACTS, seconds_per_prefill_id=0.0001), room)
    assert isinstance(plan, Plan)
    assert plan.chunk == Chunk(long, 700, "memory")
    assert isinstance(schedule([long], FACTS, Room(TRANSIENT.prefill(CHUNK_FLOOR, 0) - 1)), GiveUp)
    floor = schedule([long], replace(FACTS, correction=50.0), room)
    assert isinstance(floor, Plan)
    assert floor.chunk == Chunk(long, CHUNK_FLOOR, "memory")


def test_waits_in_order_of_arrival() -> None:
    waiting = [sequence(i, 3, arrival=10 - i) for i in range(6)]
    assert schedule(waiting, FACTS, PLENTY) == Admit(waiting[5], waiting[5].first_capacity)


@pytest.mark.parametrize("preempted", [False, True])
def test_who_has_ended_before_the_first_in_line_could_begin_passes_it_for_nothing(preempted: bool) -> None:
    running = board(sequence(1, 400, max_tokens=100))
    running.launched = running.computed = 399
    large, quick, slow = (sequence(2, 2_000), sequence(3, 50, max_tokens=20), sequence(4, 50, max_tokens=300))
    if preempted:
        large.preempt(0)
    room = Room(free=1_500_000)
    passing = schedule([running, large, slow, quick], FACTS, room)
    assert passing == Admit(quick, 70)
    passing = schedule([running, large, slow], FACTS, room)
    assert passing == Admit(slow, 350, past=large)  # it may hold it up, which is counted
    passing.book()
    assert large.overtaken == 350
    large.overtaken = OVERTAKING * large.first_capacity
    assert isinstance(schedule([running, large, slow], FACTS, room), Plan)
    assert schedule([running, large, slow, quick], FACTS, room) == Admit(quick, 70)
    # It has been running for a while: the quick one would end later.
    running.limit = running.launched + 20
    assert isinstance(schedule([running, large, quick], FACTS, room), Plan)


def test_nobody_passes_for_nothing_with_a_longer_answer_than_a_row_begins_with() -> None:
    running = board(sequence(1, 400, max_tokens=None))
    running.launched = running.computed = 399
    large, room = sequence(2, 3_000), Room(free=2_500_000)
    large.overtaken = OVERTAKING * large.first_capacity
    slow, quick = (sequence(3, 50, max_tokens=FIRST_ROOM + more) for more in (1, -10))
    assert isinstance(schedule([running, large, slow], FACTS, room), Plan)
    assert schedule([running, large, quick], FACTS, room) == Admit(quick, quick.first_capacity)


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    simulation = Simulation(1 << 40)
    simulation.sequences = [sequence(0, 60_000), sequence(1, 200)]
    chosen = [plan.chunk.sequence.id for plan in (simulation.step() for _ in range(2)) if plan.chunk]
    assert 1 in chosen


def test_the_oldest_prompt_keeps_half_of_the_prefill() -> None:
    facts = replace(FACTS, decode_concurrency=1000, prompt_concurrency=1000, chunk_longest=512)
    long = board(sequence(0, 60_000))
    prompts = [long, *(board(sequence(i, 2000)) for i in range(1, 200))]
    given_to = {True: 0, False: 0}
    while long.prefill_left:
        plan = schedule(prompts, facts, PLENTY)
        assert isinstance(plan, Plan)
        assert plan.chunk is not None
        given_to[plan.chunk.sequence is long] += plan.chunk.length
        account(plan.chunk, [s for s in prompts if s.prefill_left])
        plan.chunk.sequence.launched += plan.chunk.length
        assert given_to[True] >= given_to[False] - 2 * 512
        prompts = [s for s in prompts if s.prefill_left]
    assert given_to[False] > 20_000


def test_chunks_are_short_while_streams_run_and_not_much_longer_without() -> None:
    long, stream = board(sequence(0, 60_000)), board(sequence(1, 1, max_tokens=100))
    facts = replace(FACTS, seconds_per_prefill_id=0.2 / 600)
    for sequences, speed, expected in [
        ([long, stream], 0.2 / 600, (600, "stall target")),
        ([long], 0.2 / 600, (900, "stall target")),
        ([long], 0.2 / 6000, (2048, "prefill_step_size")),
        ([long, stream], 1.0, (CHUNK_FLOOR, "stall target")),
        ([long], None, (CHUNK_FLOOR, "stall target")),  # a slow device would hold everybody for minutes
    ]:
        plan = schedule(sequences, replace(facts, seconds_per_prefill_id=speed), PLENTY)
        assert isinstance(plan, Plan)
        assert plan.chunk is not None
        assert (plan.chunk.length, plan.chunk.decided_by) == expected


def test_the_least_left_is_chosen_until_the_oldest_was_passed_over() -> None:
    old, new = sequence(0, 5000), sequence(1, 300)
    assert choose_prompt([old, new]) is new
    old.passed_over = 1
    assert choose_prompt([old, new]) is old


def test_suspects_run_one_at_a_time_alone_and_the_others_by_turns() -> None:
    suspects = [board(sequence(id_, 20)) for id_ in (1, 2)]
    others = [board(sequence(id_, 20)) for id_ in (3, 4)]
    for row in (*suspects, *others):
        row.launched = row.computed = 19
    for row in suspects:
        row.accusation = Accusation((19, 20), apart=True)
    rows = [*suspects, *others]
    plans = [schedule(rows, replace(FACTS, apart=apart), PLENTY) for apart in (True, False)]
    assert [plan.decode for plan in plans if isinstance(plan, Plan)] == [(suspects[0],), tuple(others)]
    alone = schedule(suspects, FACTS, PLENTY)
    assert isinstance(alone, Plan)
    assert alone.decode == (suspects[0],), "nobody else is there to take a turn"
    suspects[0].computed = suspects[0].launched = 20
    plan = schedule(rows, replace(FACTS, apart=True), PLENTY)
    assert isinstance(plan, Plan)
    assert plan.decode == (suspects[1],), "who has passed runs with the others"
