"""The engine process: its session, its end in words, its output, and that it never outlives its front."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.support import scripted_engine
from tests.support.tickets import run

from penstock.supervisor.process import COMMAND, LINES_PER_SECOND, EngineProcess, describe_exit

SEGV = "killed by signal 11 (SIGSEGV)"


@pytest.mark.parametrize(
    ("code", "platform", "words"),
    [
        (3, "linux", "exited with code 3"),
        (0, "linux", "exited with code 0"),
        (
            -11,
            "linux",
            f"{SEGV}, which on Linux is what a failed allocation looks like",
        ),
        (-11, "darwin", SEGV),
        (-9, "linux", "killed by signal 9 (SIGKILL), by hand, or by the kernel's out-of-memory killer"),
        (-99, "linux", "killed by signal 99"),
    ],
)
def test_exits_are_described_for_people(code, platform, words):
    assert describe_exit(code, platform) == words


def test_a_file_where_the_server_is_started_stands_for_no_module(tmp_path):
    """A project under work may have a queue.py, and code that is not to be trusted."""
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong one')")
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "required: --socket-fd" in done.stderr


def start(program):
    """An engine process that runs a line of Python; returns it and a future of its exit code."""
    over = asyncio.get_running_loop().create_future()
    return EngineProcess([sys.executable, "-c", program], 3, over.set_result), over


def close(process):
    process.socket.close()
    process.page.close()


def test_it_has_a_session_of_its_own_and_knows_its_epoch():
    async def main():
        program = "import os; print(os.getsid(0) == os.getpid(), os.environ['PENSTOCK_ENGINE_EPOCH'])"
        process, over = start(program)
        assert await over == 0
        assert process.last_words == ["True 3"]
        close(process)

    run(main())


def test_it_inherits_two_descriptors_and_the_standard_three():
    async def main():
        process, over = start("import os; print(len(os.listdir('/proc/self/fd')) - 1)")
        assert await over == 0
        assert process.last_words == ["5"]
        close(process)

    if sys.platform != "linux":
        pytest.skip("reads /proc")
    with open(os.devnull) as held:
        os.set_inheritable(held.fileno(), True)
        run(main())


def test_what_it_prints_is_logged_at_its_level_and_bounded(caplog):
    async def main():
        program = (
            "print('WARNING:careful'); print('noise'); print('x' * 5000); [print(n) for n in range(3000)]"
        )
        process, over = start(program)
        await over
        close(process)

    with caplog.at_level(logging.DEBUG, "penstock.engine"):
        run(main())
    lines = [(record.levelname, record.message) for record in caplog.records if "engine" in record.name]
    assert lines[:2] == [("WARNING", "careful"), ("DEBUG", "noise")]
    assert max(len(line) for _, line in lines) == 2000
    assert LINES_PER_SECOND <= len(lines) < 2000


def test_a_kill_is_reaped_and_told_once():
    async def main():
        process, over = start("import time; time.sleep(600)")
        process.kill(stacks=False, grace=0.0)
        assert await over == -signal.SIGKILL
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        process.kill(stacks=False, grace=0.0)
        close(process)

    run(main())


def test_a_start_that_fails_leaves_nothing_open():
    async def main():
        before = sorted(os.listdir("/dev/fd"))
        with pytest.raises(OSError, match="nonexistent"):
            EngineProcess(["/nonexistent/engine"], 1, print)
        assert sorted(os.listdir("/dev/fd")) == before

    run(main())


_FRONT = """
import asyncio, json, sys
from penstock import wire
from penstock.supervisor.backend import Backend, Job
from array import array
async def main():
    backend = Backend(json.loads(sys.argv[1]))
    backend.start(wire.EngineOptions("scripted"))
    await backend.wait_ready()
    ticket = backend.open(Job(array("I", range(100000)), wire.Sampling()))
    await ticket.next()
    print(backend.snapshot()["engine"]["pid"], flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def alive(pid):
    """Running, not merely waiting to be reaped by whoever inherited it."""
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        command = ["ps", "-o", "stat=", "-p", str(pid)]
        state = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return state.strip()[:1] not in ("", "Z")
    return False


@pytest.mark.parametrize("faults", [[], [{"at": "sent", "n": 3, "do": "hang"}]])
def test_no_engine_outlives_a_front_killed_with_sigkill(faults):
    environment = scripted_engine.environment({"faults": faults, "token_seconds": 0.001, "exit_grace": 0.3})
    front = subprocess.Popen(
        [sys.executable, "-c", _FRONT, json.dumps(scripted_engine.COMMAND)],
        env=environment,
        stdout=subprocess.PIPE,
    )
    pid = int(front.stdout.readline())
    assert alive(pid)
    front.kill()
    front.wait()
    front.stdout.close()
    deadline = time.monotonic() + 15
    while alive(pid):
        assert time.monotonic() < deadline, "the engine is an orphan"
        time.sleep(0.02)
