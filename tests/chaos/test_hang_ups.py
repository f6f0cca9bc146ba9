"""Hang-ups under load by the hundred, at every stage of a request: nothing of them stays."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support import hasty_front, tiny_models
from tests.support.hang_ups import STAGES, descriptors, hang_up, post, text, until, vanish
from tests.support.whole_server import WholeServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, drops packets by a filter")
AT_A_TIME = 6
LONG = 1200


def settled(server: WholeServer) -> dict[str, Any]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        health = server.health()
        open_ones = (health["open"], health["ending"], health["front"]["open_requests"])
        memory = health["memory"]
        if open_ones == (0, 0, 0) and memory["running"] == memory["waiting"] == 0:
            return health
        time.sleep(0.1)
    raise AssertionError(f"not at rest: {health}")


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def vanish_together(server: WholeServer, seeds: range) -> None:
    """Clients that vanish, some queued, some in prefill, some decoding; they stay till they are found out."""
    body = {"temperature": 0, "max_tokens": 4000, "logit_bias": {str(tiny_models.END_OF_TURN): -100}}
    clients = []
    for seed in seeds:
        content = text(LONG if seed % 2 else 30, seed)
        stream = seed % 3 != 0
        message = {"role": "user", "content": content}
        clients.append(post(server.port, {**body, "messages": [message], "stream": stream}))
        if stream:
            until(clients[-1], b'"role":"assistant"')
        vanish(clients[-1])
    settled(server)
    for client in clients:
        client.close()


@pytest.mark.parametrize("count", [70, pytest.param(1000, marks=pytest.mark.chaos)])
def test_nothing_of_a_hang_up_stays(tmp_path: Path, count: int) -> None:
    """A seventh of the clients says nothing when it goes: only unanswered keepalives tell."""
    model = tiny_models.write_model_dir(tmp_path / "model", "qwen3")
    flags = ("--decode-concurrency", "4", "--prompt-concurrency", "2")
    with WholeServer(model, tmp_path, *flags, program=hasty_front.COMMAND) as server:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            leave = lambda at: hang_up(server.port, STAGES[at % len(STAGES)], at, LONG)  # noqa: E731
            list(pool.map(leave, range(len(STAGES) * 3)))  # what lives as long as the process comes to be
            before = settled(server)
            files = descriptors(server.process.pid)
            memory = resident(server.process.pid)
            silent = range(10_000, 10_000 + -(-count // 7))
            list(pool.map(leave, range(100, 100 + count - len(silent))))
        settled(server)
        said = server.log().count("client gone")
        for start in range(silent.start, silent.stop, AT_A_TIME * 2):
            vanish_together(server, range(start, min(start + AT_A_TIME * 2, silent.stop)))
        health = settled(server)
        assert server.log().count("client gone") - said == len(silent), "found out, not ended by themselves"
        assert health["engine_deaths"] == 0
        assert health["journal_bytes"] == health["front"]["held_bytes"] == 0
        assert health["memory"]["counts"].get("audit_repairs", 0) == 0
        live = [h["memory"]["accounts"].get("live_kv", 0) for h in (before, health)]
        assert live[0] == live[1] == 0
        end = time.monotonic() + 15
        while descriptors(server.process.pid) > files and time.monotonic() < end:
            time.sleep(0.1)
        assert descriptors(server.process.pid) <= files
        assert resident(server.process.pid) - memory < 32 << 20
        again = hang_up(server.port, "last", 7)
        answer = server.ask(again, 3)
        assert answer.answered
        assert answer.body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "what was computed is used"
        log = server.log()
    assert "Traceback" not in log, log[-3000:]
    assert "BrokenPipe" not in log
