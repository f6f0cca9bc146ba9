"""Laws of scheduling, played on the counting engine: no thrashing, no starving, no waste, no refusal."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stateful.counting_engine import COSTS, FACTS, TRANSIENT, WEIGHTS, CountingEngine, Times

from penstock.config import Options
from penstock.engine import scheduler, sequence
from penstock.engine.scheduler import Facts, Measure, Plan, Preempt, Room
from penstock.engine.sequence import Sequence
from penstock.memory import costs
from penstock.memory.costs import Fit
from penstock.memory.probe import Reading
from penstock.supervisor.budget import KEEP_AVAILABLE, Ceiling, Governor
from penstock.supervisor.queue import QueueLimits

FIT = Fit(COSTS, TRANSIENT)
WIDE = replace(FACTS, decode_concurrency=32, prompt_concurrency=8)


@dataclass
class ForcedEngine(CountingEngine):
    """Every growth costs the youngest its row, whether or not there is room, and nothing of it is kept."""

    caching: bool = False
    forced: set[tuple[int, int]] = field(default_factory=set)

    def decide(self, facts: Facts, room: Room) -> Plan | Measure:
        decision = super().decide(facts, room)
        on_board = [s for s in self.sequences.values() if s.row is not None]
        if isinstance(decision, Plan) and len(on_board) > 1:
            growing = {(s.id, capacity) for s, capacity in decision.grow}
            if growing - self.forced:
                if self.in_flight is None:
                    self.forced |= growing
                return Preempt(max(on_board, key=lambda s: s.arrival))
        return decision


MIXES = [
    # sequences, rows at once, budget ÷ the longest alone, prompts, answers, first room, growth
    (12, 8, 8, (50, 2000), (200, 1500), 64, 64),
    (20, 8, 3, (50, 2000), (200, 1500), 64, 64),
    (20, 16, 30, (1000, 2000), (200, 600), 64, 32),
]


def computed_per_useful(monkeypatch: pytest.MonkeyPatch, mix: tuple) -> float:
    count, rows, share, prompts, answers, first_room, growth = mix
    monkeypatch.setattr(sequence, "FIRST_ROOM", first_room)
    monkeypatch.setattr(costs, "GROWTH", growth)
    draw = random.Random(count * rows)
    engine = ForcedEngine(WEIGHTS + int(share * FIT.alone(4_000)), replace(WIDE, decode_concurrency=rows))
    for _ in range(count):
        engine.submit(draw.randint(*prompts), None, draw.randint(*answers))
    engine.play(60_000)
    engine.close()
    assert engine.wide["Preempt"] >= min(10, count)
    return engine.computed / engine.useful()


def test_computes_at_most_three_times_what_is_useful_with_preemption_at_every_growth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ratios = [computed_per_useful(monkeypatch, mix) for mix in MIXES]
    print("\ncomputed ÷ useful:", [f"{ratio:.2f}" for ratio in ratios])
    assert max(ratios) <= 3
    # Without the rule of readmission the law does not hold.
    monkeypatch.setattr(Sequence, "may_return", lambda self, departures: True)
    ratios = [computed_per_useful(monkeypatch, mix) for mix in MIXES]
    print("without waiting for departures:", [f"{ratio:.2f}" for ratio in ratios])
    assert max(ratios) > 3


# -- who waits ---------------------------------------------------------------------------------------


def storm(seed: int, monkeypatch: pytest.MonkeyPatch, count: int = 24) -> CountingEngine:
    """So many requests open all the time, every sixteenth nearly as long as can be; a budget that moves."""
    monkeypatch.setattr(sequence, "FIRST_ROOM", 32)
    draw, longest = random.Random(seed), 8_192
    alone = FIT.alone(longest)
    facts = replace(FACTS, decode_concurrency=12, prompt_concurrency=8, stall_target=1e9, chunk_longest=1024)
    engine = CountingEngine(WEIGHTS + int(1.15 * alone), facts, context=longest)
    while engine.steps < 1_200:
        if len(engine.sequences) < count:
            length = min(longest - 60, int(16 * 2 ** (9.2 * draw.random() ** 1.5)))
            length = longest - 60 if len(engine.lives) % 16 == 2 else length
            engine.submit(length, draw.choice([3, 20, 50, 50, 90, 400, None]))
        if draw.random() < 0.05:
            least = engine.weights + int(0.15 * alone)
            engine.set_budget(engine.ceiling if draw.random() < 0.7 else draw.randint(least, engine.ceiling))
        engine.turn()
    return engine


def test_most_of_the_budget_is_in_use_while_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """And more of them end than if those who have ended in time could not pass for nothing."""
    used, ended = {}, {}
    for rule in ("both", "so many ids", "neither"):
        if rule != "both":
            monkeypatch.setattr(scheduler, "_steps_until", lambda *_: 0)
        if rule == "neither":
            monkeypatch.setattr(scheduler, "OVERTAKING", 0)
        engines = [storm(seed, monkeypatch) for seed in range(3)]
        used[rule] = statistics.median(share for engine in engines for share in engine.in_use)
        ended[rule] = sum(life.ended == "length" for engine in engines for life in engine.lives.values())
    print("\nin use while requests wait, by who may pass the first:", used, "requests that ended:", ended)
    assert used["neither"] < min(0.85, used["so many ids"])
    assert max(0.85, used["so many ids"]) <= used["both"]
    assert ended["neither"] < ended["so many ids"] < ended["both"]


def waits(seed: int, answers: int) -> int | None:
    """Steps until a large one is on board behind rows that decode, while requests for so many ids arrive."""
    draw = random.Random(seed)
    engine = CountingEngine(WEIGHTS + FIT.alone(5_000), replace(WIDE, decode_concurrency=16))
    for _ in range(draw.randint(2, 8)):
        engine.submit(draw.randint(1, 600), max_tokens=draw.randint(5, 500))
    for _ in range(20):
        engine.turn()
    large = engine.submit(int(0.9 * engine.longest), max_tokens=20)
    before = engine.steps
    while engine.sequences[large].row is None:
        while answers and len(engine.sequences) < 20:
            engine.submit(draw.randint(1, 300), max_tokens=draw.randint(1, answers))
        engine.turn()
        if engine.steps - before > 3_000:
            return None
    return engine.steps - before


def test_who_passes_for_nothing_costs_the_first_in_line_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where answers are as long as they may be, it is on board as early as if nobody had come after it.

    But for a few steps: a chunk may have to wait for others' chunks, which is not foreseen.
    """
    monkeypatch.setattr(scheduler, "OVERTAKING", 0)
    pairs = [(waits(seed, 0), waits(seed, 200)) for seed in range(30)]
    print("\nsteps that a large one waits, alone and with others behind it:", pairs)
    assert all(alone and behind and behind <= alone + 10 for alone, behind in pairs)
    assert sum(alone for alone, _ in pairs if alone) > 30 * 100
    monkeypatch.setattr(Sequence, "steps_left", 0)
    monkeypatch.setattr(scheduler, "_steps_until", lambda *_: 1)
    assert None in [waits(seed, 200) for seed in range(5)]


def steps_until_on_board(engine: CountingEngine, large: int, bound: int, small: int) -> int | None:
    """Steps until this one has a row, while small ones arrive without end; None if more than the bound."""
    before = engine.steps
    while engine.steps - before <= bound:
        while len(engine.sequences) < 20:
            engine.submit(small, max_tokens=30)
        engine.turn()
        if engine.sequences[large].row is not None:
            return engine.steps - before
    return None


@given(small=st.integers(1, 400), share=st.floats(0.3, 1.0), rows=st.integers(2, 12), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_large_one_comes_on_board_while_small_ones_arrive_without_end(
    small: int, share: float, rows: int, seed: int
) -> None:
    """Those on board and those that may pass it end one after the other, each within its own steps."""
    draw = random.Random(seed)
    engine = CountingEngine(WEIGHTS + FIT.alone(5_000), replace(WIDE, decode_concurrency=rows))
    for _ in range(draw.randint(0, 10)):
        engine.submit(draw.randint(1, 2_000), max_tokens=draw.randint(1, 300))
    for _ in range(draw.randint(0, 40)):
        engine.turn()
    older = len(engine.sequences)
    longest = max((s.limit for s in engine.sequences.values()), default=0)
    large = engine.submit(int(share * (engine.longest - 1)), max_tokens=20)
    passing = scheduler.OVERTAKING * engine.sequences[large].first_capacity // (small + 30)
    steps = 2 * (max(longest, small + 30) // 256 + 2) + 300 + 3
    assert steps_until_on_board(engine, large, (older + passing + 1) * steps, small) is not None
    assert engine.wide["passed"] <= passing + older * (1 + scheduler.OVERTAKING * 2_300)


def test_without_the_limit_on_passing_a_large_one_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control of the one before."""
    waited = {}
    for overtaking in (scheduler.OVERTAKING, 10**9):
        monkeypatch.setattr(scheduler, "OVERTAKING", overtaking)
        engine = CountingEngine(WEIGHTS + FIT.alone(5_000), WIDE)
        for _ in range(20):
            engine.submit(200, max_tokens=30)
            engine.turn()
        large = engine.submit(engine.longest - 1, max_tokens=20)
        waited[overtaking] = steps_until_on_board(engine, large, 1_000, 200)
    print("\nsteps that a large one waits, by how many times its ids may pass it:", waited)
    first, second = waited.values()
    assert first is not None
    assert second is None


# -- no waste ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3_000, 11_000])
@pytest.mark.parametrize(("max_tokens", "stop", "share"), [(1_024, 1_024, 1.0), (32_000, 200, 0.9)])
def test_with_the_budget_for_k_k_run_at_once(length: int, max_tokens: int, stop: int, share: float) -> None:
    k = 10
    ceiling = WEIGHTS + FIT.together(k, length)
    engine = CountingEngine(
        ceiling, replace(WIDE, decode_concurrency=64, prompt_concurrency=64), context=64_000, caching=False
    )
    for _ in range(k + 5):
        engine.submit(length, max_tokens, stop)
    engine.play(50_000)
    engine.close()
    print(f"\n{engine.most_on_board} of {k} at once")
    assert share * k <= engine.most_on_board <= k
    assert not engine.wide["Preempt"]


def test_104_requests_of_11000_ids_at_once_are_all_served_by_default() -> None:
    options = Options()
    facts = replace(
        FACTS,
        decode_concurrency=options.decode_concurrency,
        prompt_concurrency=options.prompt_concurrency,
        chunk_longest=options.prefill_step_size,
        stall_target=options.stall_target_ms / 1000,
    )
    engine = CountingEngine(
        WEIGHTS + FIT.together(6, 11_000), facts, context=32_768, times=Times(per_id=1e-4)
    )
    for waiting in range(104):
        QueueLimits(options.max_queue, options.max_queue_tokens, options.max_wait).check(
            waiting, 11_000 * waiting, 11_000, None
        )
        assert engine.accepts(11_000)
        engine.submit(11_000, None, stop=100)
    engine.play(100_000)
    engine.close()
    assert [life.ended for life in engine.lives.values()] == ["stop"] * 104
    assert engine.computed <= 1.01 * engine.useful()


# -- short behind long -------------------------------------------------------------------------------


def long_prompt(times: Times, arrivals: list[float]) -> tuple[CountingEngine, float]:
    """A prompt of 60,000 ids, and 200 ids at each of these times; when the long one's first id came."""
    engine = CountingEngine(WEIGHTS + FIT.alone(150_000), WIDE, context=200_000, times=times, caching=False)
    warm = engine.submit(600, max_tokens=2)  # before it no speed is known
    engine.play(100)
    assert engine.lives[warm].ended
    start = engine.clock
    long = engine.submit(60_000, max_tokens=5)
    for time in arrivals:
        at = start + time
        engine.at(at, lambda at=at: engine.submit(200, max_tokens=20, asked=at))
    engine.play(50_000)
    engine.close()
    first = engine.lives[long].first_id
    assert first is not None
    return engine, first - start


@pytest.mark.parametrize("per_id", [1e-4, 2e-4, 4e-4])
@pytest.mark.parametrize("gap", [6.0, 1.0])
def test_a_short_prompt_behind_a_long_one(per_id: float, gap: float) -> None:
    """First id within three stall targets and its own prefill; the long one loses a quarter at most."""
    times = Times(per_id=per_id, per_pair=per_id / 2e5)
    target = WIDE.stall_target
    assert 256 * (times.per_id + 60_000 * times.per_pair) + times.chunk < target, "or the floor wins"
    _, alone = long_prompt(times, [])
    draw = random.Random(7)
    arrivals = [at * gap + draw.random() for at in range(int(alone / gap))]
    engine, together = long_prompt(times, arrivals)
    own = times.chunk + 200 * times.per_id
    waits = [life.first_id - life.asked for life in engine.lives.values() if life.prompt == 200]
    shorts = sum(seconds for id_, seconds in engine.chunk_seconds.items() if engine.lives[id_].prompt == 200)
    taken = shorts + engine.decode_seconds
    print(
        f"\n{1 / per_id:.0f} ids per second: worst wait {max(waits):.2f} s of {3 * target + own:.2f} s; the "
        f"long one alone {alone:.1f} s, with {len(arrivals)} others {together:.1f} s, theirs {taken:.1f} s"
    )
    assert len(waits) == len(arrivals) >= 1
    assert max(waits) <= 3 * target + own
    assert together <= 1.25 * alone + taken


# -- what cannot be, and what the system does --------------------------------------------------------


def test_ten_times_the_possible_context_ends_and_the_others_go_on() -> None:
    """The front refuses it; past the front it is ended when it is alone, and nothing loops."""
    engine = CountingEngine(WEIGHTS + FIT.alone(3_000), WIDE, context=10**9)
    before = engine.submit(500, max_tokens=50)
    huge = engine.submit(10 * engine.longest, max_tokens=50)
    after = [engine.submit(700, max_tokens=50) for _ in range(4)]
    assert not engine.accepts(10 * engine.longest)
    engine.play(2_000)
    engine.close()
    assert engine.lives[huge].ended == "error"
    assert {engine.lives[id_].ended for id_ in (before, *after)} == {"length"}


def test_500_requests_at_once() -> None:
    engine = CountingEngine(WEIGHTS + FIT.alone(20_000), WIDE)
    draw = random.Random(3)
    for _ in range(500):
        engine.submit(draw.randint(1, 300), max_tokens=draw.randint(1, 20))
    engine.play(20_000)
    engine.close()
    assert {life.ended for life in engine.lives.values()} == {"length"}


def test_a_budget_below_the_weights_stops_all_but_the_oldest_and_nothing_fails() -> None:
    engine = CountingEngine(WEIGHTS + FIT.alone(8_000), WIDE)
    first = engine.submit(900, max_tokens=400)
    others = [engine.submit(900, max_tokens=400) for _ in range(5)]
    for _ in range(20):
        engine.turn()
    assert engine.most_on_board > 1
    engine.set_budget(WEIGHTS // 2)
    for _ in range(1_000):
        engine.turn()
    assert engine.lives[first].ended == "length"
    assert all(engine.lives[id_].ended is None for id_ in others)
    engine.set_budget(engine.ceiling)
    engine.play(5_000)
    engine.close()
    assert {life.ended for life in engine.lives.values()} == {"length"}


@given(
    free=st.integers(-(10**8), 10**8),
    pool=st.integers(0, 10**7),
    evictable=st.integers(0, 10**7),
    slack=st.integers(0, 10**8),
    rows=st.lists(st.tuples(st.integers(1, 5_000), st.integers(0, 5_000), st.booleans()), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_any_room_has_an_answer(
    free: int, pool: int, evictable: int, slack: int, rows: list[tuple[int, int, bool]]
) -> None:
    engine = CountingEngine(1 << 40)
    for length, launched, on_board in rows:
        s = engine.sequences[engine.submit(length, max_tokens=50)]
        if on_board:
            s.row, s.capacity, s.launched = object(), s.first_capacity, min(launched, length - 1)
    decision = scheduler.schedule(engine.sequences.values(), FACTS, Room(free, pool, evictable, slack))
    assert isinstance(decision, Plan | Measure)


def test_a_cut_to_a_tenth_and_back_refuses_nothing() -> None:
    """By the governor, whose readings and floors are a second old; and the front's limit never moves."""
    ceiling = WEIGHTS + 4 * FIT.alone(5_000)
    engine = CountingEngine(ceiling, replace(WIDE, decode_concurrency=6), times=Times(per_id=2e-5))
    governor = Governor(Ceiling(ceiling, "the test"), 0.0)
    draw, longest = random.Random(5), engine.longest
    floor, least = 0, ceiling

    def second(now: int) -> None:
        nonlocal floor, least
        short = 5 <= now < 15
        reading = Reading(available=ceiling // 10 + KEEP_AVAILABLE if short else 1 << 50, footprint=0)
        engine.set_budget(governor.update(reading, floor, float(now)))
        least = min(least, engine.accounts.ledger.budget)
        on_board = sorted((s for s in engine.sequences.values() if s.row), key=lambda s: s.arrival)
        floor = engine.accounts.floors(on_board, TRANSIENT)[1]
        assert engine.longest == longest
        if now < 25:
            for _ in range(3):
                engine.submit(
                    draw.choice([100, 1_000, 4_000, longest - 1]), draw.choice([20, 200, None]), 600
                )

    for now in range(300):
        engine.at(float(now), lambda now=now: second(now))
    engine.play(200_000)
    engine.close()
    assert least < ceiling / 3, "the floor is the weights, the pool and the oldest row"
    assert engine.wide["Preempt"] >= 1
    assert {life.ended for life in engine.lives.values()} <= {"stop", "length"}
