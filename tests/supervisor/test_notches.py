"""The budget after deaths for memory: a notch lower each, raised after quiet times, never without end."""

from __future__ import annotations

from penstock import wire
from penstock.memory.probe import GiB, Machine, Pretended
from penstock.supervisor.notches import DEEPEST, Notches
from penstock.supervisor.warden import OUT_OF_MEMORY, Warden

DEVICE = wire.Device("cpu", "x", None, 0)


def test_each_death_takes_a_notch_and_each_quiet_time_gives_one_back():
    notches = Notches(quiet=100.0)
    caps = [notches.cap(1000)]
    for now in (0.0, 10.0):
        notches.lower(now)
        caps.append(notches.cap(1000))
    assert caps == [1000, 875, 765]
    notches.look(109.0)
    assert notches.cap(1000) == 765
    notches.look(110.0)
    assert notches.cap(1000) == 875
    notches.look(209.0)
    assert notches.cap(1000) == 875
    notches.look(210.0)
    notches.look(9999.0)
    assert notches.cap(1000) == 1000


def test_there_is_a_deepest_notch():
    notches = Notches()
    for _ in range(50):
        notches.lower(0.0)
    assert notches.count == DEEPEST
    assert notches.cap(1000) > 500


def test_the_next_engine_is_told_less_and_more_again_when_it_stays_quiet():
    warden = Warden(Pretended(Machine(physical=100 * GiB)), None, Notches(quiet=100.0))
    first = warden.device(DEVICE, 0.0)
    warden.notches.lower(0.0)
    second = warden.device(DEVICE, 1.0)
    assert second.ceiling == first.ceiling
    assert second.size == int(first.size * 7 / 8)
    assert second.decided_by == "an engine that ran out of memory"
    books = wire.Status({}, second.size, 0, 0, 0, 0, 0, 0, {})
    assert warden.look(1, books, 50.0) is None
    raised = warden.look(1, books, 101.0)
    assert raised is not None
    assert raised.size == first.size


def test_an_engine_that_says_it_ran_out_gets_less_at_once():
    warden = Warden(Pretended(Machine(physical=100 * GiB)))
    first = warden.device(DEVICE, 0.0)
    books = wire.Status({}, first.size, 0, 0, 0, 0, 0, 0, {OUT_OF_MEMORY: 1})
    lowered = warden.look(1, books, 1.0)
    assert lowered is not None
    assert lowered.size == int(first.size * 7 / 8)
    assert warden.look(1, books, 2.0) is None
