"""The traffic of a profile: the same for the same seed, and shaped as its description says."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby
from operator import attrgetter
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.traffic.profiles import PROFILES, Event, agent, chatty, fanout, issue1390, to_lines, words

SIZES = st.tuples(st.integers(0, 10**6), st.floats(0.001, 1.0), st.integers(1, 5))


def blocks(events: list[Event]) -> set[str]:
    return {block for e in events for block, _ in (*e.system, *e.text, *e.summary)}


def size(event: Event) -> int:
    return sum(count for _, count in event.text)


@pytest.mark.parametrize("name", PROFILES)
@given(size=SIZES)
@settings(max_examples=25, deadline=None)
def test_equal_seeds_are_equal_traffic_and_others_share_nothing(
    name: str, size: tuple[int, float, int]
) -> None:
    seed, scale, sessions = size
    events = PROFILES[name](seed, scale, sessions=sessions)
    assert events == PROFILES[name](seed, scale, sessions=sessions)
    assert to_lines(events) == to_lines(PROFILES[name](seed, scale, sessions=sessions))
    assert not blocks(events) & blocks(PROFILES[name](seed + 1, scale, sessions=sessions))


@pytest.mark.parametrize("name", PROFILES)
@given(size=SIZES)
@settings(max_examples=25, deadline=None)
def test_every_session_is_in_order_and_has_something_to_say(name: str, size: tuple[int, float, int]) -> None:
    seed, scale, sessions = size
    for _, group in groupby(PROFILES[name](seed, scale, sessions=sessions), attrgetter("session")):
        turns = list(group)
        assert [event.turn for event in turns] == list(range(len(turns)))
        for event in turns:
            assert event.system == turns[0].system
            assert all(count >= 1 for _, count in (*event.system, *event.text, *event.summary))
            assert event.text
            assert event.answer >= 1
            assert event.pause >= 0
            assert sum(e is not None for e in (event.leave_in_prefill, event.leave_after, event.leave_at)) < 2


def test_the_reported_sessions_have_the_reported_shape() -> None:
    events = [event for seed in range(60) for event in issue1390(seed)]
    firsts = [e for e in events if e.turn == 0]
    assert len(firsts) == 600
    assert all(55_000 <= sum(n for _, n in e.system) + size(e) <= 64_001 for e in firsts)
    assert all(10_000 <= sum(n for _, n in e.system) <= 18_000 for e in events)
    later = [size(e) for e in events if e.turn]
    assert 780 < median(later) < 970
    assert 0.07 < sum(new > 6000 for new in later) / len(later) < 0.13
    assert 190 < median(e.answer for e in events) < 240
    left = [e for e in events if e.leave_in_prefill is not None or e.leave_after is not None]
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
    assert len({e.system for e in events}) == 1
    assert len({e.text for e in events}) == len(events)
    assert all(3 <= sum(e.session == s for e in events) <= 6 for s in range(4))


@pytest.mark.parametrize("scale", [0.0001, 0.05])
def test_scale_shortens_what_is_said_but_leaves_something_to_say(scale: float) -> None:
    events = issue1390(0, scale)
    assert all(size(e) >= 1 and e.answer >= 4 for e in events)
    assert max(size(e) + e.system[0][1] for e in events) <= 64_000 * scale + 2


def test_agents_have_the_published_figures() -> None:
    events = [event for seed in range(40) for event in agent(seed)]
    steps = Counter((e.system, e.session) for e in events)
    assert 11 < median(steps.values()) < 19
    assert max(steps.values()) == 40
    assert 780 < median(map(size, events)) < 970
    assert 190 < median(e.answer for e in events) < 240
    assert all(sum(n for _, n in e.system) == 18_000 for e in events)
    assert not [e for e in events if e.strip or e.summary or e.leave_in_prefill or e.leave_after]


def test_drift_breaks_prefixes_as_clients_do() -> None:
    sessions = [
        list(group)
        for seed in range(40)
        for _, group in groupby(agent(seed, drift=True), attrgetter("session"))
    ]
    openings = {turns[0].system[0][0] for turns in sessions}
    assert len(openings) == len(sessions), "a line of its own opens each"
    ordered = [[block for block, _ in turns[0].system[1:]] for turns in sessions]
    assert 0.2 < sum(tools != sorted(tools) for tools in ordered) / len(ordered) < 0.45
    later = [event for turns in sessions for event in turns if event.turn]
    assert 0.08 < sum(event.strip for event in later) / len(later) < 0.15
    compacted = [event for event in later if event.summary]
    assert compacted
    assert all(20_000 <= event.summary[0][1] < 26_000 for event in compacted), "a fifth of what was held"


def test_sub_agents_start_together_on_one_prefix() -> None:
    events = fanout(3)
    starts = [event for event in events if event.turn == 0]
    assert len(starts) == 21
    assert {event.pause for event in starts} == {0.0}
    assert {event.system for event in events} == {(("3 system", 11_000),)}
    assert all(8 <= count <= 20 for count in Counter(event.session for event in events).values())


def test_editors_and_chats_ask_beside_the_agent() -> None:
    events = chatty(0, sessions=2)
    kinds = Counter(event.kind for event in events)
    assert kinds == {"chat": 16, "title": 4, "count": 64, "fim": 80}
    typed = [event for event in events if event.kind == "fim"]
    assert {event.leave_at for event in typed} == {0.2}
    counts = Counter(event.pause for event in events if event.kind == "count")
    assert list(counts.values()) == [32, 32], "in bursts"
    assert len({event.session for event in events if event.kind != "fim"}) == 2 * (1 + 2 + 32)


def test_lines_carry_everything() -> None:
    def tupled(value: object) -> object:
        return tuple(map(tupled, value)) if isinstance(value, list) else value

    events = agent(1, 0.3, drift=True)
    read = [
        Event(**{k: tupled(v) for k, v in json.loads(line).items()}) for line in to_lines(events).splitlines()
    ]
    assert read == events


def test_a_block_is_the_same_text_wherever_it_is_made() -> None:
    assert words("a", 50) == words("a", 50)
    assert words("a", 80).startswith(words("a", 50))
    assert words("a", 50) != words("b", 50)
    assert len(words("a", 50).split()) == 50
