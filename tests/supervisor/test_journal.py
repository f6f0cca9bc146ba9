"""The journal: what goes to the next engine, in which order, who is over already and who is accused."""

from __future__ import annotations

from array import array

import pytest
from tests.support.tickets import job

from penstock import wire
from penstock.guilt import Accusation
from penstock.supervisor.journal import Entry, Journal, accused, in_order_of_resubmission
from penstock.supervisor.ticket import Ticket


def entry(id, prompt=10, delivered=(), epoch=1, prefilled=0, **fields):
    work = job(range(prompt), **fields)
    ticket = Ticket(work, [id], lambda *_: None)
    made = Entry(id, 0, work, work.sampling, ticket, epoch=epoch, prefilled=prefilled)
    made.delivered.extend(delivered)
    return made


def test_ids_are_never_given_twice():
    journal = Journal()
    assert journal.new_ids(2) + journal.new_ids(1) == [1, 2, 3]


def test_a_submit_carries_what_was_delivered():
    submit = entry(5, 3, [70000, 8], max_tokens=9, min_tokens=1, ignore_eos=True).submit()
    assert wire.unpack_ids(submit.prompt) == array("I", [0, 1, 2])
    assert wire.unpack_ids(submit.delivered) == array("I", [70000, 8])
    assert (submit.id, submit.arrival) == (5, 5)
    assert (submit.max_tokens, submit.min_tokens, submit.ignore_eos) == (9, 1, True)


def test_the_shortest_prefill_comes_first_then_the_oldest():
    entries = [entry(1, 50), entry(2, 10, range(5)), entry(3, 10), entry(4, 15)]
    assert [e.id for e in in_order_of_resubmission(entries)] == [3, 2, 4, 1]


@pytest.mark.parametrize(
    ("fields", "delivered", "reason"),
    [
        ({}, [], None),
        ({}, [1, 9], "stop"),
        ({}, [9, 1], None),
        ({"min_tokens": 2}, [1, 9], None),
        ({"ignore_eos": True}, [1, 9], None),
        ({"max_tokens": 2}, [1, 1], "length"),
        ({"max_tokens": 3}, [1, 1], None),
        ({"max_tokens": 0}, [], "length"),
    ],
)
def test_a_sequence_whose_last_id_was_delivered_is_over(fields, delivered, reason):
    assert entry(1, delivered=delivered, **fields).over({9}) == reason


def test_bytes_counts_a_shared_prompt_once():
    journal = Journal()
    work = job(range(100), n=3)
    ticket = Ticket(work, journal.new_ids(3), lambda *_: None)
    for choice, id in enumerate(ticket.ids):
        journal.add(Entry(id, choice, work, work.sampling, ticket, delivered=array("I", [1, 2])))
    assert journal.bytes == 4 * (100 + 6)


def test_accused_are_the_open_rows_that_the_page_names():
    running, bystander, unknown, ended = entry(1), entry(2), entry(3, epoch=None), entry(4)
    ended.life.end(True)
    rows = [(1, 5, 6), (3, 0, 9), (4, 0, 9), (77, 1, 2)]
    assert accused([running, bystander, unknown, ended], rows) == [(running, (5, 6))]
    assert accused([running], []) == []


def test_a_row_that_runs_apart_is_submitted_as_such():
    suspect = entry(1)
    suspect.accusation = Accusation((5, 9))
    assert suspect.submit().apart == 0
    suspect.accusation = Accusation((5, 9), apart=True)
    assert suspect.submit().apart == 9


def test_prefill_is_progress_only_where_it_never_was():
    made = entry(1, prompt=100)
    assert made.prefill_came(50)
    assert made.engine_died()
    assert (made.prefilled, made.on_board, made.epoch) == (0, False, None)
    assert not made.prefill_came(50)
    assert made.prefill_came(99)
    made.delivered.extend([1] * 20)
    assert made.computed == 119
    assert not made.prefill_came(119)
