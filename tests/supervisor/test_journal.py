"""The journal: what goes to the next engine, in which order, who is over already and who is guilty."""

from __future__ import annotations

from array import array

import pytest
from tests.support.tickets import job

from penstock import wire
from penstock.supervisor.journal import Entry, Journal, guilty, in_order_of_resubmission
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


def test_who_was_running_at_two_deaths_at_one_place_is_guilty():
    entries = [entry(1), entry(2), entry(3, epoch=None)]
    assert guilty(entries, {1: 512}) == []
    assert guilty(entries, {1: 512}) == [entries[0]]


def test_who_advanced_between_is_not():
    entries = [entry(1)]
    assert guilty(entries, {1: 512}) == []
    assert guilty(entries, {1: 1024}) == []
    assert guilty(entries, {1: 1024}) == entries


def test_bystanders_are_never_accused_while_the_page_names_a_row():
    entries = [entry(1), entry(2, delivered=[4])]
    for _ in range(3):
        assert entries[1] not in guilty(entries, {1: 0})


def test_where_the_page_names_none_all_that_the_engine_knew_are_suspects():
    moved, stuck, unknown = entry(1, delivered=[1]), entry(2, prefilled=5), entry(3, epoch=None)
    entries = [moved, stuck, unknown]
    assert guilty(entries, {}) == []
    moved.delivered.append(2)
    assert guilty(entries, {}) == [stuck]
