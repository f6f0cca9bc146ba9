"""A started backend with a scripted engine, for the tests of its life."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest
from tests.support import scripted_engine
from tests.support.tickets import run

from penstock import wire
from penstock.supervisor.backend import Backend
from penstock.supervisor.machine import Policy

OPTIONS = wire.EngineOptions("scripted")
FAST = Policy(backoff=0.01, exit_grace=5.0)


@contextlib.asynccontextmanager
async def serving(script=None, *, drain=0.0, **fields):
    """A started backend whose engine plays `script`; stopped and audited at the end."""
    fields.setdefault("policy", FAST)
    fields.setdefault("command", scripted_engine.COMMAND)
    backend = Backend(environment=scripted_engine.environment(script or {}), **fields)
    backend.start(OPTIONS)
    try:
        yield backend
    finally:
        await backend.stop(drain)
        snapshot = backend.snapshot()
        assert (snapshot["open"], snapshot["ending"], snapshot["engine"]) == (0, 0, None)
        assert snapshot["journal_bytes"] == 0
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def play(main, script=None, **fields):
    async def inner():
        async with serving(script, **fields) as backend:
            return await main(backend)

    return run(inner())


def die(at, n=1, do="SIGKILL", **fields):
    return {"faults": [{"epoch": 1, "at": at, "n": n, "do": do, **fields}]}
