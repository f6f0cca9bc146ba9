"""The last events: bounded, alike ones counted together, each with advice where there is some."""

from __future__ import annotations

import pytest

from penstock.errors import Kind, PenstockError
from penstock.supervisor.events import ADVICE, LONGEST, MOST, Events


def test_alike_events_are_one_with_the_last_ones_words_and_time():
    events = Events()
    events.note("budget_cut", "warning", "cut to 3.2 GB")
    events.note("engine_death", "error", "died")
    first = events.last[0].time
    events.note("budget_cut", "warning", "cut to 1,024.5 GB")
    assert [(e.kind, e.message, e.count) for e in events.last] == [
        ("engine_death", "died", 1),
        ("budget_cut", "cut to 1,024.5 GB", 2),
    ]
    assert events.last[1].time >= first


def test_the_list_and_its_words_are_bounded():
    events = Events()
    for number in range(3 * MOST):
        events.note("internal", "error", "x" * number + "y" * 1000)
    assert len(events.last) == MOST
    assert {len(e.message) for e in events.last} == {LONGEST}


@pytest.mark.parametrize(
    ("kind", "level"),
    [(Kind.OUT_OF_MEMORY, "error"), (Kind.BUSY, "warning"), (Kind.CONTEXT_LENGTH, "warning")],
)
def test_a_failure_that_an_operator_can_mend_is_an_event_with_advice(kind, level):
    events = Events()
    events.failed(PenstockError(kind, "so it is"))
    (event,) = events.last
    assert (event.kind, event.level, event.message) == (kind.label, level, "so it is")
    assert event.advice == ADVICE[kind.label]


def test_what_only_a_client_can_mend_is_none():
    events = Events()
    events.failed(PenstockError(Kind.INVALID_FIELD, "temperature: …"))
    events.failed(PenstockError(Kind.CANCELLED, "by the operator"))
    assert not events.last


def test_advice_is_for_kinds_there_are():
    happenings = {"engine_death", "budget_cut", "preemption", "given_up", "step_error", "audit_repair"}
    assert set(ADVICE) - happenings <= {kind.label for kind in Kind}
