"""The pure machines: the engine's life, every order of a sequence's ends, the judgement of a hang."""

from __future__ import annotations

import itertools

import pytest

from penstock.errors import Kind
from penstock.page import Phase, View
from penstock.supervisor.machine import (
    AskExit,
    EngineLife,
    FailOpen,
    HangLimits,
    Kill,
    Policy,
    SequenceLife,
    SequenceState,
    Spawn,
    State,
    Stopped,
    SubmitOpen,
    WaitUntil,
    Watch,
)

POLICY = Policy(loading_deaths=3, backoff=1.0, longest_backoff=8.0, exit_grace=5.0)


def ready_life():
    life = EngineLife(POLICY)
    assert life.start() == [Spawn()]
    assert life.ready() == [SubmitOpen()]
    return life


def test_it_starts_loading_and_becomes_ready():
    life = EngineLife(POLICY)
    assert life.state is State.LOADING
    life.start()
    life.ready()
    assert life.state is State.READY


def test_a_death_restarts_at_once_and_the_open_are_submitted_again():
    life = ready_life()
    assert life.died(10.0, "why") == [Spawn()]
    assert (life.state, life.reason) == (State.RESTARTING, "why")
    assert life.ready() == [SubmitOpen()]
    assert life.reason is None


def test_backoff_doubles_over_deaths_without_progress_up_to_its_bound():
    life = ready_life()
    life.died(0.0, "")
    waits = []
    for _ in range(6):
        life.ready()
        (wait,) = life.died(100.0, "")
        assert isinstance(wait, WaitUntil)
        waits.append(wait.at - 100.0)
        assert life.tick(wait.at - 0.01) == []
        assert life.tick(wait.at) == [Spawn()]
        assert life.tick(wait.at) == []
    assert waits == [1, 2, 4, 8, 8, 8]


def test_progress_resets_the_backoff():
    life = ready_life()
    for _ in range(5):
        assert life.died(0.0, "") == [Spawn()]
        life.ready()
        life.progressed()


def test_three_deaths_in_a_row_while_loading_halt_with_the_reason():
    life = EngineLife(POLICY)
    life.start()
    life.died(0.0, "one")
    life.tick(life.died(0.0, "two")[0].at)
    (fail,) = life.died(2.0, "three")
    assert isinstance(fail, FailOpen)
    assert fail.kind is Kind.ENGINE_HALTED
    assert life.state is State.HALTED
    assert "3 times" in life.reason
    assert "three" in life.reason
    assert life.tick(1e9) == []


def test_a_model_that_has_served_is_loaded_again_however_often_that_fails():
    life = ready_life()
    life.died(0.0, "killed")
    waits, failed = [], []
    for _ in range(12):
        *lost, wait = life.died(100.0, "no memory")
        failed.append([type(action) for action in lost] == [FailOpen])
        assert life.state is State.RESTARTING
        waits.append(wait.at - 100.0)
        assert life.tick(wait.at) == [Spawn()]
    assert failed == [False, False] + [True] * 10, "nobody waits for more than three"
    assert waits[-1] == POLICY.longest_backoff
    life.ready()
    assert (life.state, life.reason) == (State.READY, None)


def died_and_ready(life, **how):
    for action in life.died(0.0, "why", **how):
        if isinstance(action, WaitUntil):
            assert life.tick(action.at) == [Spawn()]
    life.ready()
    return life.state


def test_three_deaths_of_engines_that_had_begun_nothing_halt():
    life = ready_life()
    assert [died_and_ready(life, by_itself=True) for _ in range(3)] == [
        State.READY,
        State.READY,
        State.HALTED,
    ]
    assert "3 times in a row without progress, at last why" in life.reason


def test_deaths_at_work_are_given_longer_so_that_the_guilty_can_be_found():
    life = ready_life()
    states = [died_and_ready(life, at_work=True) for _ in range(POLICY.stuck_deaths)]
    assert states == [State.READY] * (POLICY.stuck_deaths - 1) + [State.HALTED]


@pytest.mark.parametrize("how", [{"by_itself": True}, {"at_work": True}])
def test_progress_between_forgives(how):
    life = ready_life()
    for _ in range(20):
        assert died_and_ready(life, **how) is State.READY
        life.progressed()


def test_who_ends_an_idle_engine_from_outside_never_halts_the_server():
    life = ready_life()
    for _ in range(50):
        assert died_and_ready(life) is State.READY


def test_a_start_that_succeeds_between_forgives_deaths_while_loading():
    life = EngineLife(POLICY)
    life.start()
    for _ in range(4):
        life.died(0.0, "")
        life.tick(1e9)
        life.died(0.0, "")
        life.tick(1e9)
        life.ready()
        assert life.state is State.READY
        life.progressed()
        life.died(0.0, "")


def test_a_halt_message_halts_at_once():
    life = EngineLife(POLICY)
    life.start()
    fail, kill = life.halt("no such architecture")
    assert fail.message.endswith("no such architecture")
    assert kill == Kill(stacks=False)
    assert life.died(1.0, "exited") == []
    assert (life.state, life.reason) == (State.HALTED, "no such architecture")
    assert life.ready() == []


@pytest.mark.parametrize("before", ["ready", "restarting", "unloaded"])
def test_a_halt_of_a_model_that_has_served_is_a_death_like_others(before):
    """Its disk may be away for a moment, or another program hold the device's memory."""
    life = ready_life()
    if before == "restarting":
        assert Spawn() in life.died(0.0, "")
    if before == "unloaded":
        life.unload(0.0)
        assert life.died(0.0, "") == []
        assert life.wanted() == [Spawn()]
    assert life.halt("it has no config.json") == []
    actions = life.died(1.0, "it has no config.json, exited with code 3")
    assert life.state is State.RESTARTING
    assert life.reason.startswith("it has no config.json")
    while Spawn() not in actions:
        actions = life.tick(1e9)
    assert life.ready() == [SubmitOpen()]


def test_a_hung_engine_is_killed_with_its_stacks():
    life = ready_life()
    assert life.hung() == [Kill(stacks=True)]
    life.died(0.0, "")
    life.ready()
    life.died(0.0, "")
    assert life.hung() == []


def test_stop_asks_then_kills():
    life = ready_life()
    assert life.stop(10.0) == [AskExit(), WaitUntil(15.0)]
    assert life.state is State.STOPPING
    assert life.tick(14.9) == []
    assert life.tick(15.0) == [Kill(stacks=False)]
    assert life.died(15.1, "") == [Stopped()]


def test_stop_does_not_wait_for_a_load():
    life = EngineLife(POLICY)
    life.start()
    assert life.stop(0.0) == [Kill(stacks=False)]
    assert life.died(0.1, "") == [Stopped()]


def test_stop_between_two_engines_starts_none():
    life = ready_life()
    life.died(0.0, "")
    (wait,) = life.died(0.0, "")
    assert life.stop(0.0) == [Stopped()]
    assert life.tick(wait.at) == []


def unloaded_life():
    life = ready_life()
    assert life.unload(10.0) == [AskExit(), WaitUntil(15.0)]
    assert life.state is State.UNLOADED
    assert life.ends_by_order
    return life


def test_an_unloaded_engine_is_no_death_and_starts_when_it_is_wanted():
    life = unloaded_life()
    assert life.died(11.0, "exited with code 0") == []
    assert (life.state, life.reason, life.deaths) == (State.UNLOADED, None, 0)
    assert life.tick(15.0) == []
    assert life.wanted() == [Spawn()]
    assert life.state is State.LOADING
    assert life.wanted() == []
    assert life.ready() == [SubmitOpen()]
    assert not life.ends_by_order
    assert life.died(20.0, "why") == [Spawn()]
    assert life.deaths == 1


def test_one_that_is_wanted_while_it_ends_starts_when_it_has_ended():
    life = unloaded_life()
    assert life.wanted() == []
    assert life.died(11.0, "exited") == [Spawn()]
    assert (life.state, life.deaths) == (State.LOADING, 0)


def test_one_that_does_not_end_when_it_is_unloaded_is_killed():
    life = unloaded_life()
    assert life.tick(15.0) == [Kill(stacks=False)]
    assert life.died(15.1, "SIGKILL") == []
    assert life.deaths == 0


@pytest.mark.parametrize("gone", [True, False])
def test_an_unloaded_server_stops(gone):
    life = unloaded_life()
    if gone:
        life.died(11.0, "")
        assert life.stop(12.0) == [Stopped()]
    else:
        assert life.stop(12.0) == [AskExit(), WaitUntil(17.0)]
        assert life.died(13.0, "") == [Stopped()]


def test_only_a_ready_engine_is_unloaded():
    life = EngineLife(POLICY)
    life.start()
    assert life.unload(0.0) == []
    assert life.wanted() == []
    life.halt("why")
    assert life.unload(0.0) == []


def test_a_restart_waits_for_the_systems_memory_but_not_for_ever():
    life = ready_life()
    (wait,) = life.died(100.0, "why", room=False)
    looks = 0
    while isinstance(wait, WaitUntil):
        assert wait.at - 100.0 <= POLICY.memory_wait + POLICY.memory_look
        (wait,) = life.tick(wait.at, room=False)
        looks += 1
    assert wait == Spawn()
    assert looks > 10
    (wait,) = life.died(200.0, "again", room=False)
    (again,) = life.tick(wait.at, room=False)
    assert life.tick(again.at, room=True) == [Spawn()]


# Sequences

ENDS = ("cancel", "text stop", "eos", "length", "death")


def orders():
    """Every order of every selection of the five, with rows between all of them."""
    for size in range(1, len(ENDS) + 1):
        yield from itertools.permutations(ENDS, size)


@pytest.mark.parametrize("engine_knows", [True, False])
def test_whatever_the_order_the_api_hears_one_end(engine_knows):
    for order in orders():
        life, knows, heard, asked = SequenceLife(), engine_knows, 0, 0
        for event in order:
            if event in ("cancel", "text stop"):
                told = life.end(knows)
                asked += told and knows
                heard += told
            elif event == "death":
                again = life.engine_died()
                assert again == (heard == 0), order
                assert life.state is not SequenceState.ENDING, order
                knows = False
            else:
                heard += life.ended()
            assert life.is_open == (heard == 0), order
        assert heard == (0 if order == ("death",) else 1), order
        assert asked <= 1, order


def test_the_engines_word_after_a_cut_closes_the_sequence_silently():
    life = SequenceLife()
    assert life.end(engine_knows=True)
    assert life.state is SequenceState.ENDING
    assert not life.ended()
    assert life.state is SequenceState.ENDED


def test_an_end_that_the_engine_need_not_hear_ends_at_once():
    life = SequenceLife()
    assert life.end(engine_knows=False)
    assert life.state is SequenceState.ENDED


# The watch

LIMITS = HangLimits(floor=30, slack=10, loading=200, first=120, interval=1)


def view(beats=0, phase=Phase.DECODE, predicted=0.0):
    return View(1, 0, beats, phase, predicted, ())


def still(watch, start, end, **fields):
    """Looks each second; the first time at which it is hung."""
    for now in range(start, end):
        if watch.hung(float(now), view(**fields), fields.get("busy", True)) is not None:
            return now
    return None


def test_no_progress_for_the_floor_is_a_hang():
    assert still(Watch(LIMITS, 0.0), 1, 200) == 32


def test_a_step_predicted_long_is_given_ten_times_that():
    assert still(Watch(LIMITS, 0.0), 1, 300, predicted=15.0) == 152


@pytest.mark.parametrize(
    ("phase", "found"), [(Phase.LOADING, 202), (Phase.PROBE, 202), (Phase.FIRST_OF_SHAPE, 122)]
)
def test_loading_and_first_shapes_are_given_longer(phase, found):
    assert still(Watch(LIMITS, 0.0), 1, 300, phase=phase) == found


def test_any_counter_that_moves_is_progress():
    watch = Watch(LIMITS, 0.0)
    assert all(watch.hung(float(now), view(beats=now // 29), True) is None for now in range(1, 300))


def test_an_idle_engine_is_never_hung_and_the_clock_starts_with_work():
    watch = Watch(LIMITS, 0.0)
    assert all(watch.hung(float(now), view(), False) is None for now in range(1, 100))
    assert still(watch, 100, 200) == 130


def test_a_front_that_was_asleep_does_not_judge():
    watch = Watch(LIMITS, 0.0)
    assert still(watch, 1, 30) is None
    assert watch.hung(60.0, view(), True) is None
    assert still(watch, 61, 200) == 91


def test_an_engine_without_a_sign_of_life_has_stalled_long_before_it_is_hung():
    watch = Watch(LIMITS, 0.0)
    for busy in (True, False):
        quiet = []
        for now in range(100, 140):
            watch.hung(float(now), view(beats=busy), busy)
            quiet.append(watch.stalled)
        assert quiet[:16] == [None] * 16
        assert all(seconds > 15 for seconds in quiet[16:])
        assert watch.hung(141.0, view(beats=5), busy) is None
        assert watch.stalled is None
