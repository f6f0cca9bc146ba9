"""Running out of memory, and clients that go away: the process stays, and nothing of them does."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import pytest
from bench.models import prompt_text
from tests.support.hang_ups import STAGES, descriptors, hang_up
from tests.support.whole_server import WholeServer, all_at_once

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of other processes, /proc")
ROOM = 48 << 20


def data_bytes(pid: int) -> int:
    """What RLIMIT_DATA counts."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024


def settled(server: WholeServer) -> dict[str, object]:
    """/health, once nothing is open any more."""
    for _ in range(1200):
        health = server.health()
        memory = health.get("memory") or {}
        if health.get("status") == "ok" and memory.get("running") == memory.get("waiting") == 0:
            counts = health["open"], health["ending"], health["front"]["open_requests"]
            if counts == (0, 0, 0):
                return health
        time.sleep(0.05)
    raise AssertionError(f"not at rest: {health}")


def test_oom_does_not_end_the_process(wide: Path, measured: dict[str, str], tmp_path: Path) -> None:
    """An allocation fails under five requests: the engine dies of it, the server and the answers don't."""
    with WholeServer(wide, tmp_path, environment=measured) as server:
        expected = [server.ask(prompt_text(100, seed), 8) for seed in range(5)]
        before = server.health()
        engine = before["engine"]["pid"]
        resource.prlimit(engine, resource.RLIMIT_DATA, (data_bytes(engine) + ROOM, resource.RLIM_INFINITY))
        answers = all_at_once(lambda seed: server.ask(prompt_text(400, 70 + seed), 12), range(5))
        again = [server.ask(prompt_text(100, seed), 8) for seed in range(5)]
        health = settled(server)
        assert server.process.poll() is None
        log = server.log()
    assert all(answer.answered for answer in answers), [a for a in answers if not a.answered]
    assert [a.body["choices"] for a in again] == [e.body["choices"] for e in expected]
    assert health["engine_deaths"] >= 1, "the allocation did not fail: the test shows nothing"
    assert "it looks like memory" in log
    assert health["memory"]["budget"] < before["memory"]["budget"]  # type: ignore[index]
    assert health["memory"]["ceiling"] == before["memory"]["ceiling"]  # type: ignore[index]


def test_disconnects_are_quiet_and_leave_nothing(plain: WholeServer) -> None:
    """Clients hang up at every stage; the work stops, the log stays calm, what was computed is of use."""
    plain.ask(prompt_text(40, 3), 2)
    settled(plain)
    files = descriptors(plain.process.pid)
    for seed, stage in enumerate(STAGES * 2):
        hang_up(plain.port, stage, seed, long=500)
    health = settled(plain)
    assert health["engine"]["rows"] == 0  # type: ignore[index]
    assert health["engine_deaths"] == 0
    assert health["memory"]["accounts"]["live_kv"] == 0  # type: ignore[index]
    for _ in range(100):
        if descriptors(plain.process.pid) <= files:
            break
        time.sleep(0.1)
    assert descriptors(plain.process.pid) <= files
    assert plain.ask(prompt_text(40, 3), 2).answered
    log = plain.log()
    os.kill(plain.process.pid, 0)
    assert "Traceback" not in log
    assert "BrokenPipe" not in log
    assert log.count("client gone") >= len(STAGES)
