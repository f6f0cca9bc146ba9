"""What goes when nobody asks for anything: decided purely, then with engines that play a script."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from tests.support.serving_backend import die, play, until
from tests.support.tickets import hear, job

from penstock.memory.probe import Machine, Pretended, Reading
from penstock.supervisor.backend import Backend
from penstock.supervisor.idle import POOL_SECONDS, Idle, Part
from penstock.supervisor.machine import HangLimits, Policy
from penstock.supervisor.warden import Warden

OFTEN = HangLimits(interval=0.05)
SOON = 0.2 / 60
"""Minutes: a fifth of a second."""


def given(idle: Idle, start: float, end: float, busy: bool = False) -> list[tuple[float, Part]]:
    seen = [(float(now), idle.look(float(now), busy)) for now in range(int(start), int(end))]
    return [(now, part) for now, part in seen if part is not None]


def test_each_part_goes_once_after_its_time() -> None:
    idle = Idle(release=1, unload=3)
    assert given(idle, 0, 1000) == [(POOL_SECONDS, Part.POOL), (60, Part.CACHE), (180, Part.ENGINE)]


def test_only_the_pool_goes_by_default() -> None:
    assert given(Idle(), 0, 100_000) == [(POOL_SECONDS, Part.POOL)]


def test_a_request_begins_the_time_anew() -> None:
    idle = Idle(unload=1)
    assert given(idle, 0, 59) == [(5, Part.POOL)]
    assert idle.look(59.0, busy=True) is None
    assert given(idle, 60, 130) == [(64, Part.POOL), (119, Part.ENGINE)]
    assert given(idle, 130, 400, busy=True) == []


def test_what_is_due_sooner_goes_first_whatever_its_kind() -> None:
    assert [part for _, part in given(Idle(release=2, unload=1), 0, 200)] == [
        Part.POOL,
        Part.ENGINE,
        Part.CACHE,
    ]


def test_an_engine_that_nobody_needs_ends_and_comes_back_with_the_next_request(caplog) -> None:
    """No death: none is counted, none is said, nothing is learned of memory."""

    async def main(backend):
        assert (await hear(backend.open(job([1, 2])))).ids == {0: [1, 2]}
        for number in (1, 2):
            began = int(time.time())
            await until(lambda: backend.state == "unloaded" and backend.snapshot()["engine"] is None)
            assert began <= backend.snapshot()["given_back"]["engine"] <= time.time()
            assert backend.snapshot()["memory"] is None
            await backend.wait_ready()  # requests are taken
            opened = backend.open(job(range(20)))
            assert backend.state == "loading"
            assert (await hear(opened)).ids == {0: list(range(20))}
            assert opened.stats.restarts == 0
            assert backend.snapshot()["engine"]["epoch"] == number + 1
        assert (backend.snapshot()["engine_deaths"], backend.warden.notches.count) == (0, 0)

    with caplog.at_level(logging.INFO):
        play(main, {"idle_beat": 0.02}, idle=Idle(unload=SOON), limits=OFTEN)
    assert "died" not in caplog.text
    assert caplog.text.count("the engine was given back") == 2
    assert caplog.text.count("the engine is being started") == 2


def test_a_request_too_short_for_the_periodic_look_counts_all_the_same() -> None:
    class Noted(Idle):
        requests = 0

        def look(self, now, busy):
            self.requests += busy
            return super().look(now, busy)

    idle = Noted()

    async def main(backend):
        await backend.wait_ready()
        before = idle.requests
        backend.open(job([1])).close()
        assert idle.requests == before + 1

    play(main, idle=idle)


def test_a_request_that_comes_while_the_engine_ends_is_served_by_the_next(monkeypatch) -> None:
    rest = Backend._rest
    opened = []

    def rest_and_ask(self, engine, busy):
        rest(self, engine, busy)
        if self.state == "unloaded":
            assert self.snapshot()["engine"] is not None, "it has not gone yet"
            opened.append(self.open(job([7, 8])))

    monkeypatch.setattr(Backend, "_rest", rest_and_ask)

    async def main(backend):
        await until(lambda: opened)
        assert (await hear(opened[0])).ids == {0: [7, 8]}
        assert backend.snapshot()["engine_deaths"] == 0
        assert backend.snapshot()["engine"]["epoch"] == 2

    play(main, idle=Idle(unload=SOON), limits=OFTEN)


def test_an_engine_that_does_not_go_is_killed_and_that_is_no_death() -> None:
    async def main(backend):
        await until(lambda: backend.state == "unloaded" and backend.snapshot()["engine"] is None)
        assert (backend.snapshot()["engine_deaths"], backend.warden.notches.count) == (0, 0)

    deaf = {"faults": [{"epoch": 1, "at": "message", "n": 1, "do": "hang"}]}
    play(main, deaf, idle=Idle(unload=SOON), limits=OFTEN, policy=Policy(exit_grace=0.2))


def test_a_server_whose_engine_is_unloaded_stops_at_once() -> None:
    async def main(backend):
        await until(lambda: backend.state == "unloaded" and backend.snapshot()["engine"] is None)
        await asyncio.wait_for(backend.stop(0.0), 1.0)

    play(main, {"idle_beat": 0.02}, idle=Idle(unload=SOON), limits=OFTEN)


def test_the_engine_is_told_what_to_give_back(monkeypatch, caplog) -> None:
    monkeypatch.setattr("penstock.supervisor.idle.POOL_SECONDS", 0.1)

    async def main(backend):
        await until(lambda: len(backend.snapshot()["given_back"]) == 2)
        await until(lambda: "released True" in caplog.text)
        assert list(backend.snapshot()["given_back"]) == ["pool", "prompt_cache"]
        assert backend.state == "ready"
        assert (await hear(backend.open(job([7])))).ids == {0: [7]}

    with caplog.at_level(logging.DEBUG):
        play(main, {"idle_beat": 0.02}, idle=Idle(release=SOON), limits=OFTEN)
    assert "the prompt cache was given back" in caplog.text
    assert "released False" in caplog.text


@pytest.mark.parametrize(("available", "waits"), [(100, True), (2000, False), (None, False)])
def test_a_restart_waits_a_little_for_the_memory_of_the_dead(available, waits, caplog) -> None:
    async def main(backend):
        assert (await hear(backend.open(job(range(20))))).ids == {0: list(range(20))}
        assert backend.snapshot()["engine_deaths"] == 1

    probe = Pretended(Machine(physical=1 << 30), Reading(available))
    script = die("sent", 8) | {"ready": {"weights_bytes": 1000}}
    began = time.monotonic()
    play(main, script, warden=Warden(probe), policy=Policy(memory_wait=0.5, memory_look=0.05))
    if waits:
        assert "its restart waits" in caplog.text
        assert time.monotonic() - began > 0.5
    else:
        assert Warden(probe).has_room(1000)
