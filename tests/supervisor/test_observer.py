"""What the front counts of its engines, over their deaths; the samples; a request's stage."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import pytest
from tests.supervisor.test_orders import PROMPT, READY, FakeEngine
from tests.support.tickets import hear, job, run

from penstock import wire
from penstock.memory.probe import GiB, Machine, Pretended
from penstock.supervisor import backend as backend_module
from penstock.supervisor import observer as observer_module
from penstock.supervisor.backend import Backend
from penstock.supervisor.machine import Policy
from penstock.supervisor.observer import Histogram, Observer
from penstock.supervisor.warden import Warden

EMPTY = wire.Status({}, 0, 0, 0, 0, 0, 0, 0, {})


def status(**fields):
    return msgspec.structs.replace(EMPTY, **fields)


@pytest.fixture(name="play")
def _play(monkeypatch):
    """Runs a test over a backend whose engines do as they are told; `clock` is the observer's."""
    engines = []

    class Engine(FakeEngine):
        def __init__(self, *of):
            super().__init__(*of)
            engines.append(self)

        def kill(self, stacks, grace):
            pass

    monkeypatch.setattr(backend_module, "_Engine", Engine)

    def play(main):
        async def inner():
            warden = Warden(Pretended(Machine(physical=32 * GiB)))
            backend = Backend(("fake",), policy=Policy(backoff=0.001), warden=warden)
            backend.start(wire.EngineOptions("fake"))
            engines[0].says(wire.Device("cpu", "x", None, 0))
            engines[0].says(READY)
            await main(backend, engines)
            for ticket in {entry.ticket for entry in backend.journal}:
                ticket.close()
            stopping = asyncio.create_task(backend.stop(0.0))
            await asyncio.sleep(0)
            engines[-1].dies()
            await stopping

        return run(inner())

    return play


async def another(backend, engines, count):
    while len(engines) < count:
        await asyncio.sleep(0.001)
    engines[-1].says(READY)


def test_counts_never_fall_when_engines_die(play):
    async def main(backend, engines):
        observer = backend.observer
        engines[0].says(status(counts={"evict": 3, "preempt": 1}, cache=wire.Cached(evicted={"memory": 70})))
        engines[0].dies()
        await another(backend, engines, 2)
        assert (observer.counts()["evictions"], observer.counts()["preemptions"]) == (3, 1)
        engines[1].says(status(counts={"evict": 2}, cache=wire.Cached(evicted={"memory": 5, "caps": 1})))
        assert observer.counts()["evictions"] == 5
        assert observer.counts()["engine_deaths"] == 1
        assert observer.cache().evicted == {"memory": 75, "caps": 1}

    play(main)


def test_tokens_are_counted_where_they_were_computed_and_where_they_were_not(play):
    async def main(backend, engines):
        observer, engine = backend.observer, engines[0]
        ticket = backend.open(job(range(100)))
        (id,) = ticket.ids
        engine.says(wire.Step(started=[wire.Started(id, 30, "diverged at token 30")]))
        assert observer.of([ticket])["prefilled"] == 30
        engine.says(wire.Step(prefill=[wire.Prefill(id, 60, 100)]))
        engine.says(wire.Step(prefill=[wire.Prefill(id, 99, 100)]))
        engine.says(wire.Step(rows=[wire.Row(id, [1])]))
        engine.says(wire.Step(rows=[wire.Row(id, [2, 3])]))
        told = {"prompt_tokens": 100, "cached_tokens": 30, "prefilled_tokens": 69, "generated_tokens": 3}
        assert {name: observer.counts()[name] for name in told} == told
        engine.says(wire.Step(ended=[wire.Ended(id, "stop", 103)]))
        await hear(ticket)
        assert {name: observer.counts()[name] for name in told} == told
        assert observer.finished == {"stop": 1}
        counted = (observer.first_token, observer.gaps, observer.whole, observer.queue, observer.decode)
        assert [sum(histogram.counts) for histogram in counted] == [1, 1, 1, 1, 1]
        assert (observer.cache().queries, observer.cache().hits) == (100, 30)

    play(main)


@pytest.mark.parametrize("delivered", [True, False])
def test_a_continuation_is_counted_and_its_prompt_computed_again(play, delivered):
    async def main(backend, engines):
        observer = backend.observer
        ticket = backend.open(job(range(100)))
        (id,) = ticket.ids
        engines[0].says(wire.Step(started=[wire.Started(id, 0, "")], prefill=[wire.Prefill(id, 99, 100)]))
        if delivered:
            engines[0].says(wire.Step(rows=[wire.Row(id, [1])]))
        engines[0].dies()
        assert observer.counts()["continuations"] == 1
        assert observer.of([ticket])["stage"] == "queued"
        assert [e.kind for e in observer.events.last] == ["engine_death"]
        await another(backend, engines, 2)
        engines[1].says(wire.Step(started=[wire.Started(id, 0, "")], prefill=[wire.Prefill(id, 99, 100)]))
        assert observer.counts()["prompt_tokens"] == 100, "asked once"
        assert observer.counts()["prefilled_tokens"] == 198, "computed twice"

    play(main)


@pytest.mark.parametrize("at", ["queued", "prefill", "decode"])
def test_a_cancel_is_counted_by_the_stage_it_came_in(play, at):
    async def main(backend, engines):
        ticket = backend.open(job(range(10)))
        (id,) = ticket.ids
        if at != "queued":
            engines[0].says(wire.Step(prefill=[wire.Prefill(id, 5, 10)]))
        if at == "decode":
            engines[0].says(wire.Step(rows=[wire.Row(id, [1])]))
        assert backend.observer.of([ticket])["stage"] == at
        ticket.close()
        assert backend.observer.cancels == {at: 1}
        assert backend.observer.finished == {"abort": 1}
        assert sum(backend.observer.whole.counts) == 0, "no latency of what was not answered"

    play(main)


def test_a_stop_string_is_no_cancel_and_a_failure_is_an_error(play):
    async def main(backend, engines):
        ended, failed = backend.open(job(range(PROMPT))), backend.open(job(range(PROMPT)))
        ended.end(0, PROMPT)
        engines[0].says(wire.Step(ended=[wire.Ended(failed.ids[0], "error", 0, "OUT_OF_MEMORY", "x")]))
        assert backend.observer.finished == {"stop": 1, "error": 1}
        assert not backend.observer.cancels

    play(main)


def test_the_engines_books_say_who_is_on_board_and_who_gave_way(play):
    async def main(backend, engines):
        observer = backend.observer
        first, second = backend.open(job(range(10), n=2)), backend.open(job(range(10)))
        one, two = first.ids
        engines[0].says(status(rows={one: 500, two: 700}))
        assert observer.of([first]) == {"stage": "prefill", "prefilled": 0, "bytes": 1200, "preempted": False}
        assert observer.of([second]) == {"stage": "queued", "prefilled": 0, "bytes": None, "preempted": False}
        assert observer.lines() == (1, 2)
        engines[0].says(wire.Step(rows=[wire.Row(one, [1]), wire.Row(two, [1])]))
        engines[0].says(status(rows={one: 500}, preempted=[two]))
        assert observer.of([first]) == {"stage": "decode", "prefilled": 0, "bytes": 500, "preempted": True}
        assert observer.lines() == (2, 1)

    play(main)


def test_memory_is_the_engines_statement_with_who_decided(play):
    async def main(backend, engines):
        accounts = {"weights": 5, "live_kv": 7}
        engines[0].says(status(accounts=accounts, active=11, pooled=2, transient=(4, 3)))
        engines[0].says(status(accounts=accounts, active=11, pooled=2))
        memory = backend.observer.memory()
        assert (memory.owners, memory.held, memory.active, memory.pooled) == (accounts, 12, 11, 2)
        assert (memory.predicted_transient, memory.measured_transient) == (4, 3), "of the last steps"
        assert memory.budget == memory.ceiling == backend.warden.ceiling
        assert memory.budget_decided_by == memory.ceiling_decided_by == "physical memory"
        engines[0].dies()
        memory = backend.observer.memory()
        assert (memory.owners, memory.held, memory.at) == ({}, 0, None)
        assert backend.observer.cache().bytes == 0

    play(main)


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(observer_module, "monotonic", lambda: self.now)
        monkeypatch.setattr(observer_module, "time", lambda: self.now)


def test_a_sample_a_second_and_marks_of_what_happened(play, monkeypatch):
    clock = Clock(monkeypatch)

    async def main(backend, engines):
        observer = backend.observer
        observer.look()
        clock.now += 0.5
        observer.look()
        engines[0].says(status(accounts={"cached": 9}, counts={"evict": 2, "preempt": 1}))
        clock.now += 0.5
        observer.look()
        clock.now += 1
        observer.look()
        engines[0].dies()
        clock.now += 1
        observer.look()
        told = observer.history(0.0)
        assert told.time == [1000.0, 1001.0, 1002.0, 1003.0]
        assert told.owners["cached"] == [0, 9, 9, 0]
        assert {len(column) for column in told.owners.values()} == {4}
        assert told.budget == [backend.warden.ceiling] * 4
        marks = sorted((mark.time, mark.kind, mark.count) for mark in told.marks)
        assert marks == [(1001.0, "eviction", 2), (1001.0, "preemption", 1), (1003.0, "death", 1)]
        later = observer.history(1001.0)
        assert (later.time, [mark.kind for mark in later.marks]) == ([1002.0, 1003.0], ["death"])
        assert [event.kind for event in observer.events.last] == ["preemption", "engine_death"]

    play(main)


def test_history_is_bounded(play, monkeypatch):
    clock = Clock(monkeypatch)

    async def main(backend, engines):
        for number in range(2 * observer_module.KEPT):
            clock.now += 1
            engines[0].says(status(counts={"evict": number}))
            backend.observer.look()
        told = backend.observer.history(0.0)
        assert len(told.time) == len(told.marks) == observer_module.KEPT
        assert told.time[-1] == clock.now

    play(main)


def test_measures_are_one_line_a_second_with_their_sums(play, monkeypatch, caplog):
    clock = Clock(monkeypatch)

    async def main(backend, engines):
        backend.observer.look()
        for step in range(20):
            engines[0].says(status(counts={"evict": 3 * step, "preempt": step, "clearpool": 1}))
            clock.now += 0.25
            backend.observer.look()
        clock.now += 5
        backend.observer.look()

    with caplog.at_level(logging.DEBUG, "penstock.supervisor"):
        play(main)
    lines = [r.message for r in caplog.records if r.message.startswith("memory:")]
    assert len(lines) == 5
    assert lines[0] == "memory: evictions 9, preemptions 3, pool clears 1"
    assert lines[1] == "memory: evictions 12, preemptions 4"


def test_a_budget_that_falls_is_an_event(play, monkeypatch):
    clock = Clock(monkeypatch)

    async def main(backend, engines):
        observer = backend.observer
        for budget in (backend.warden.ceiling, backend.warden.ceiling - 1, 10 * GiB, 9 * GiB):
            backend.warden._told = budget
            clock.now += 1
            observer.look()
        (event,) = observer.events.last
        assert (event.kind, event.count) == ("budget_cut", 2), "a byte less is not worth a word"
        assert "9.7 GB" in event.message

    play(main)


def test_a_histogram_counts_up_to_and_with_each_bound():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 99):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 104)


def test_reading_an_observer_before_any_engine():
    async def main():
        observer = Backend(("fake",)).observer
        assert isinstance(observer, Observer)
        observer.look()
        assert observer.memory().budget is None
        assert observer.cache().tree == []
        assert observer.history(0.0).budget == [None]
        assert set(observer.counts().values()) == {0}

    run(main())
