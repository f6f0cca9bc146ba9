"""The judgement of deaths: one alone twice, several one at a time, memory nobody; in every order."""

from __future__ import annotations

import itertools

import pytest

from penstock.guilt import Accusation, judge, judge_memory, must_be_sole


class Row:
    def __init__(self, name):
        self.name = name
        self.accusation: Accusation | None = None

    def __repr__(self):
        return self.name


def test_accused_alone_twice_over_one_span_is_guilty():
    row = Row("a")
    assert judge([(row, (0, 512))]) == []
    assert judge([(row, (0, 512))]) == [row]


def test_smaller_chunks_over_the_same_span_do_not_hide_it():
    row = Row("a")
    judge([(row, (1024, 2048))])
    assert judge([(row, (1536, 1792))]) == [row]


@pytest.mark.parametrize("span", [(512, 1024), (900, 901)])
def test_who_advanced_between_is_innocent(span):
    row = Row("a")
    judge([(row, (0, 512))])
    assert judge([(row, span)]) == []
    assert judge([(row, span)]) == [row], "but it is accused of the new span"


def test_a_death_before_the_span_is_another_matter():
    row = Row("a")
    judge([(row, (100, 101))])
    assert judge([(row, (0, 64))]) == []


def test_in_company_twice_makes_rows_run_apart_and_alone_there_one_is_guilty():
    a, b = Row("a"), Row("b")
    company = [(a, (10, 11)), (b, (30, 31))]
    assert judge(company) == []
    assert not a.accusation.apart
    assert judge(company) == []
    assert a.accusation.apart
    assert b.accusation.apart
    assert judge([(a, (10, 11))]) == [a]


@pytest.mark.parametrize(
    "poisoned", [*itertools.combinations(range(8), 1), *itertools.combinations(range(8), 2)]
)
def test_whichever_of_eight_are_poisoned_only_they_fail(poisoned):
    """Eight rows decode; a step with a poisoned one ends the engine. Apart rows run one at a time."""
    rows = [Row(str(i)) for i in range(8)]
    at = dict.fromkeys(rows, 0)
    alive, failed, deaths = list(rows), [], 0
    while any(at[row] < 3 for row in alive):
        apart = [r for r in alive if r.accusation and r.accusation.apart and not r.accusation.passed(at[r])]
        running = apart[:1] or [r for r in alive if at[r] < 3]
        if any(rows.index(r) in poisoned and at[r] == 1 for r in running):
            deaths += 1
            guilty = judge([(r, (at[r], at[r] + 1)) for r in running])
            failed += guilty
            alive = [r for r in alive if r not in guilty]
        else:
            for row in running:
                at[row] += 1
    assert sorted(rows.index(r) for r in failed) == list(poisoned)
    assert deaths <= 2 + len(poisoned)


def test_a_death_for_memory_accuses_nobody_in_company():
    a, b = Row("a"), Row("b")
    for _ in range(2):
        assert judge_memory([(a, (0, 9)), (b, (5, 6))], sole=False, lowered=True) == []
    assert not must_be_sole(a, 0)
    assert judge_memory([(a, (0, 9)), (b, (5, 6))], sole=False, lowered=True) == []
    assert must_be_sole(a, 0)
    assert not must_be_sole(a, 9)
    assert judge_memory([(a, (0, 9))], sole=True, lowered=True) == [a]


@pytest.mark.parametrize(
    ("sole", "lowered", "span", "guilty"),
    [
        (True, True, (0, 9), True),
        (True, False, (0, 9), False),
        (False, True, (0, 9), False),
        (True, True, (9, 18), False),
    ],
)
def test_memory_convicts_only_who_dies_alone_on_board_with_less_and_has_not_advanced(
    sole, lowered, span, guilty
):
    row = Row("a")
    judge_memory([(row, (0, 9))], sole=True, lowered=False)
    assert bool(judge_memory([(row, span)], sole=sole, lowered=lowered)) == guilty


def test_nobody_named_nobody_guilty():
    assert judge([]) == []
    assert judge_memory([], sole=False, lowered=True) == []
