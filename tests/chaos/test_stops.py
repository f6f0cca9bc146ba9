"""Processes stopped, hung and asked to go, with the real engine: found out, replaced, drained."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import tiny_models
from tests.support.hang_ups import post, until
from tests.support.tickets import hear, run
from tests.support.whole_server import ROOT, WholeServer

from penstock import wire
from penstock.supervisor.backend import Backend, Job
from penstock.supervisor.machine import HangLimits

PROMPTS = [array("I", range(5, 5 + length)) for length in (3, 40, 90, 150)]
QUICK = HangLimits(floor=1.5, loading=60.0, interval=0.2, kill_grace=2.0)
ENGINE = (sys.executable, "-m", "penstock.engine")
SLOW = (sys.executable, str(ROOT / "tests/support/faulty_engine.py"))


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model_dir(tmp_path_factory.mktemp("stops") / "model", "qwen3")


@contextlib.asynccontextmanager
async def serving(model: Path, limits: HangLimits, command=ENGINE, **environment: str):
    backend = Backend(command, limits=limits, environment={**os.environ, **environment})
    backend.start(wire.EngineOptions(str(model)))
    try:
        await backend.wait_ready()
        yield backend
    finally:
        await backend.stop(0.0)


def open_all(backend: Backend, most: int = 150):
    sampling = wire.Sampling(temperature=1.0)
    return [backend.open(Job(p, sampling, max_tokens=most, seed=7, ignore_eos=True)) for p in PROMPTS]


async def answers(tickets) -> list[list[int]]:
    return [(await hear(ticket, 60.0)).ids[0] for ticket in tickets]


def test_a_stopped_engine_is_replaced_and_streams_go_on(model: Path) -> None:
    async def main() -> None:
        async with serving(model, QUICK) as backend:
            expected = await answers(open_all(backend))
            tickets = open_all(backend)
            while not all(ticket.stats.generated[0] > 5 for ticket in tickets):
                await asyncio.sleep(0.01)
            os.kill(backend.snapshot()["engine"]["pid"], signal.SIGSTOP)
            assert await answers(tickets) == expected
            assert backend.snapshot()["engine_deaths"] == 1

    run(main(), 120)


@pytest.mark.parametrize(
    ("limits", "seconds"), [(QUICK, 4), pytest.param(HangLimits(), 25, marks=pytest.mark.chaos)]
)
def test_a_slow_first_step_is_not_killed(model: Path, limits: HangLimits, seconds: int) -> None:
    """It takes longer than a hang may, but is the first of its shape."""

    async def main() -> None:
        async with serving(model, limits, SLOW, PENSTOCK_TEST_FAULT=f"slow:{seconds}") as backend:
            assert all(len(ids) == 20 for ids in await answers(open_all(backend, 20)))
            assert backend.snapshot()["engine_deaths"] == 0

    run(main(), 120)


@pytest.mark.parametrize("bad", [1, 2])
def test_who_aborts_the_engine_fails_alone(model: Path, bad: int) -> None:
    async def main() -> None:
        async with serving(model, HangLimits(), SLOW, PENSTOCK_TEST_FAULT="abort:255") as backend:
            poison = [array("I", [*range(9, 30 + i), 255, 7]) for i in range(bad)]
            sampling = wire.Sampling(logit_bias={255: -1000.0})
            good = [backend.open(Job(p, sampling, max_tokens=1500, ignore_eos=True)) for p in PROMPTS]
            guilty = [backend.open(Job(p, sampling, max_tokens=9)) for p in poison]
            for ticket in guilty:
                with pytest.raises(Exception, match="died twice"):
                    await hear(ticket)
            assert all(ticket.stats.generated[0] < 1500 for ticket in good), "they were there all the time"
            for ticket in good:
                ticket.end(0, 10)
            assert 2 <= backend.snapshot()["engine_deaths"] <= 2 + 2 * bad

    run(main(), 180)


@pytest.mark.parametrize("seconds", [4.0, pytest.param(20.0, marks=pytest.mark.chaos)])
def test_a_front_that_was_stopped_loses_nothing(model: Path, tmp_path: Path, seconds: float) -> None:
    body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 300, "stream": True, "seed": 3}
    body |= {"stream_options": {"include_usage": True}, "logit_bias": {str(tiny_models.END_OF_TURN): -100}}
    with WholeServer(model, tmp_path) as server, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(contextlib.closing(post(server.port, body))) for _ in range(8)]
        for stream in streams:
            until(stream, b'"content":"')
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(server.process.pid, signal.SIGCONT)
        rests = [until(stream, b"[DONE]") for stream in streams]
        assert all(b'"completion_tokens":300' in rest and b"[DONE]" in rest for rest in rests)
        assert server.health()["engine_deaths"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_go_it_cuts_with_an_error_event_and_exits_with_0(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    body = {"messages": [{"role": "user", "content": "abc"}], "stream": True, "temperature": 0}
    body["logit_bias"] = {str(tiny_models.END_OF_TURN): -100}
    with WholeServer(model, tmp_path, "--drain-timeout", "1") as server:
        stream = post(server.port, body)
        until(stream, b'"content":"', 3)
        os.kill(server.process.pid, number)
        late = server.ask("x", 1)
        rest = until(stream, b"\n\ndata: [DONE]")
        stream.close()
        assert server.process.wait(20) == 0
    assert late.status in (0, 503)
    event = json.loads(rest.strip().split(b"data: ")[-1].split(b"\n")[0])
    assert event["error"]["code"] == "shutting_down"


@pytest.fixture(name="many_files")
def _many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_clients_that_mean_harm_leave_room_for_others(model: Path, tmp_path: Path) -> None:
    """2,000 that say next to nothing, headers of 1 MB, bodies of 100 MB, and of one byte at a time."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with WholeServer(model, tmp_path) as server, contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))

        idle = [connect() for _ in range(2000)]
        for connection in idle:
            connection.send(b"G")
        large, named, slow = connect(), connect(), connect()
        large.send(head + b"Content-Length: 100000000\r\n\r\n" + b" " * 65536)
        slow.send(head + b"Content-Length: 1000\r\n\r\n{")
        with contextlib.suppress(OSError):  # it is told before all has been sent
            named.sendall(head + b"X-A: " + b"a" * 1_000_000)
        assert large.recv(4096).startswith(b"HTTP/1.1 413 ")
        with contextlib.suppress(ConnectionResetError):
            assert named.recv(4096).startswith(b"HTTP/1.1 431 ")
        assert server.ask("x", 1).status == 200
        assert server.health()["status"] == "ok"
        assert slow.send(b" ") == 1, "it may still end in time"
        assert "Traceback" not in server.log()
