"""The traffic of a profile: the same for the same seed, and shaped as its description says."""

from __future__ import annotations

import json
from statistics import median

import pytest

from penstock.traffic.profiles import Event, issue1390, to_lines, words


def test_equal_seeds_are_equal_traffic_and_others_are_not() -> None:
    assert issue1390(3, 0.1) == issue1390(3, 0.1)
    assert issue1390(3, 0.1) != issue1390(4, 0.1)


def test_the_reported_sessions_have_the_reported_shape() -> None:
    events = [event for seed in range(60) for event in issue1390(seed)]
    firsts = [e for e in events if e.turn == 0]
    assert len(firsts) == 600
    assert all(55_000 <= e.shared + e.new <= 64_001 for e in firsts)
    assert all(10_000 <= e.shared <= 18_000 for e in events)
    later = [e.new for e in events if e.turn]
    assert 780 < median(later) < 970
    assert 0.07 < sum(new > 6000 for new in later) / len(later) < 0.13
    assert 190 < median(e.answer for e in events) < 240
    left = [e for e in events if e.leave_in_prefill is not None or e.leave_after is not None]
    assert not [e for e in left if e.leave_in_prefill is not None and e.leave_after is not None]
    assert 0.26 < sum(e.leave_in_prefill is not None for e in events) / len(events) < 0.34
    assert 0.16 < sum(e.leave_after is not None for e in events) / len(events) < 0.24
    back = [e for e in events if e.back_after is not None]
    assert set(map(id, back)) <= set(map(id, left))
    assert 0.76 < len(back) / len(left) < 0.84
    assert all(e.back_after is not None and e.back_after <= 1.0 for e in back)
    assert 0.4 < sum(e.back_streams for e in back) / len(back) < 0.6


def test_sessions_share_a_prefix_and_nothing_else() -> None:
    events = issue1390(0, 0.05, 4)
    assert {e.session for e in events} == {0, 1, 2, 3}
    assert len({e.shared for e in events}) == 1
    assert len({e.block for e in events}) == len(events)
    assert all([e.turn for e in events if e.session == s] == list(range(n)) for s in range(4)
               for n in [sum(e.session == s for e in events)])  # fmt: skip
    assert all(3 <= sum(e.session == s for e in events) <= 6 for s in range(4))


@pytest.mark.parametrize("scale", [0.0001, 0.05])
def test_scale_shortens_what_is_said_but_leaves_something_to_say(scale: float) -> None:
    events = issue1390(0, scale)
    assert all(e.new >= 1 and e.shared >= 1 and e.answer >= 4 for e in events)
    assert max(e.new + e.shared for e in events) <= 64_000 * scale + 2


def test_lines_carry_everything() -> None:
    events = issue1390(1, 0.3)
    assert [Event(**json.loads(line)) for line in to_lines(events).splitlines()] == events


def test_a_block_is_the_same_text_wherever_it_is_made() -> None:
    assert words(7, 50) == words(7, 50)
    assert words(7, 80).startswith(words(7, 50))
    assert words(7, 50) != words(8, 50)
    assert len(words(7, 50).split()) == 50
