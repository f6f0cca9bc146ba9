"""An engine killed at every message of a session, sent or received, and at every step: nobody notices."""

from __future__ import annotations

import asyncio

import pytest
from tests.support import scripted_engine
from tests.support.tickets import hear, job, run

from penstock import wire
from penstock.supervisor.backend import Backend
from penstock.supervisor.machine import Policy

AT_A_TIME = 4
LONG = range(300, 6300)
"""The answer that is cut: it would last for seconds, so that the cut comes before its end on any machine."""
SCRIPT = {
    "prefill_chunk": 16,
    "tokens_per_step": 3,
    "token_seconds": 0.002,
    "answers": [{"contains": [300], "ids": list(LONG)}],
}


async def session(fault: dict[str, object] | None) -> int:
    """Three requests, one of two choices, one cut by its text. Returns how many engines died."""
    script = {**SCRIPT, "faults": [fault] if fault else []}
    backend = Backend(
        scripted_engine.COMMAND,
        policy=Policy(backoff=0.01),
        environment=scripted_engine.environment(script),
    )
    backend.start(wire.EngineOptions("scripted"))
    try:
        tickets = [backend.open(job(range(base, base + 30), n=n)) for base, n in ((100, 1), (200, 2))]
        cut = backend.open(job(range(300, 340)))
        heard = await hear_some(cut)
        cut.end(0, 40 + 6)
        for base, ticket in zip((100, 200), tickets, strict=True):
            got = await hear(ticket)
            assert all(ids == list(range(base, base + 30)) for ids in got.ids.values()), fault
            assert len(got.reasons) == len(ticket.ids), fault
        assert heard[:6] == list(LONG[:6]), fault
        assert (await hear(cut)).reasons == {0: "cut"}, fault
        deaths = int(backend.snapshot()["engine_deaths"])
    finally:
        await backend.stop(0.0)
    assert backend.snapshot()["journal_bytes"] == 0
    return deaths


async def hear_some(ticket) -> list[int]:
    heard: list[int] = []
    while len(heard) < 6:
        heard += getattr(await ticket.next(), "ids", [])
    return heard


BOTH = ("SIGKILL", "SIGABRT")


@pytest.mark.parametrize("signals", [BOTH, pytest.param(BOTH[::-1], marks=pytest.mark.chaos)])
@pytest.mark.parametrize(("at", "count"), [("message", 5), ("step", 17), ("sent", 17)])
def test_killed_at_every_one(at: str, count: int, signals: tuple[str, str]) -> None:
    """By one that looks like memory and one that accuses who ran, in turn; the other way round in chaos."""
    faults = [{"epoch": 1, "at": at, "n": n, "do": signals[n % 2]} for n in range(1, count + 1)]

    async def all_of_them() -> list[int]:
        deaths = []
        for start in range(0, count, AT_A_TIME):
            deaths += await asyncio.gather(*map(session, faults[start : start + AT_A_TIME]))
        return deaths

    deaths = run(all_of_them(), 120)
    assert deaths[: count * 2 // 3] == [1] * (count * 2 // 3), "the faults struck"


def test_and_without_a_fault() -> None:
    assert run(session(None)) == 0
