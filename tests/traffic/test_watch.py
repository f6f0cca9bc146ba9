"""The peak of a local server's memory: its children count."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

from penstock.traffic.watch import below, held_by, local_pid

GRANDCHILD = "b = bytearray(60_000_000); print('held', flush=True); import sys; sys.stdin.read()"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GRANDCHILD!r}])"


def test_what_a_grandchild_holds_is_counted() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "held\n"
        assert child.pid in list(below(os.getpid()))
        assert len(list(below(child.pid))) == 1
        over = threading.Event()
        over.set()
        ((at, held),) = held_by(child.pid, over)
        assert held > 60_000_000
        assert at >= 0
        child.stdin.close()


def test_a_process_that_is_gone_held_nothing() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    over = threading.Event()
    over.set()
    assert held_by(done.pid, over) == []


def test_the_process_behind_a_local_url_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert local_pid(f"http://127.0.0.1:{server.getsockname()[1]}/v1") == os.getpid()
    assert local_pid("http://192.0.2.1:80/v1") is None
