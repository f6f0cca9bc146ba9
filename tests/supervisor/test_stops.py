"""How a backend stops: open jobs end or are cut, and the engine is gone, whatever it does."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.serving_backend import die, play
from tests.support.tickets import hear, job

from penstock.errors import Kind, PenstockError
from penstock.supervisor.machine import Policy


def test_stop_lets_open_jobs_end_and_admits_none():
    async def main(backend):
        opened = backend.open(job(range(30)))
        await backend.wait_ready()
        stopping = asyncio.create_task(backend.stop(20.0))
        await asyncio.sleep(0)
        assert backend.state == "stopping"
        with pytest.raises(PenstockError) as caught:
            backend.open(job([1]))
        assert caught.value.kind is Kind.SHUTTING_DOWN
        assert (await hear(opened)).ids == {0: list(range(30))}
        await stopping

    play(main, {"token_seconds": 0.002})


def test_stop_fails_what_outlasts_the_drain():
    async def main(backend):
        opened = backend.open(job(range(1000)))
        await backend.wait_ready()
        await backend.stop(0.1)
        with pytest.raises(PenstockError) as caught:
            await hear(opened)
        assert caught.value.kind is Kind.SHUTTING_DOWN

    play(main, {"token_seconds": 0.05})


def test_stop_wakes_those_who_wait_for_a_load():
    async def main(backend):
        waiting = asyncio.create_task(backend.wait_ready())
        await asyncio.sleep(0.05)
        await backend.stop(0.0)
        with pytest.raises(PenstockError):
            await waiting

    play(main, {"load_seconds": 60.0}, policy=Policy(exit_grace=60.0))


def test_stop_kills_an_engine_that_does_not_exit():
    async def main(backend):
        opened = backend.open(job([1]))
        await backend.wait_ready()
        await backend.stop(0.2)
        with pytest.raises(PenstockError):
            await hear(opened)

    play(main, die("prefill", 1, "hang"), policy=Policy(exit_grace=0.2))
