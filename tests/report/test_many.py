"""Five hundred requests at once: all are served, or told when to come back; the server goes on."""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from bench.models import prompt_text
from tests.support.hang_ups import leave, post, until
from tests.support.whole_server import WholeServer

MANY = 500
QUEUE = 20
ASK: dict[str, Any] = {"max_tokens": 2, "temperature": 0}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True, scope="module")
def descriptors() -> None:
    """Each client has a socket: some systems allow a process no more than 256 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 2 * MANY:
        most = 2 * MANY if hard == resource.RLIM_INFINITY else min(2 * MANY, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@dataclass(frozen=True)
class Told:
    """What a client was answered."""

    status: int
    retry_after: str | None
    body: dict[str, Any]


@contextmanager
def many_at_once(server: WholeServer) -> Iterator[list[Future[Told]]]:
    """So many short requests, each on a connection of its own; all have an answer at the block's end."""

    def ask(seed: int) -> Told:
        body = {**ASK, "messages": [{"role": "user", "content": prompt_text(3, seed)}]}
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=300)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
            answer = connection.getresponse()
            return Told(answer.status, answer.getheader("retry-after"), json.load(answer))

    with ThreadPoolExecutor(MANY) as threads:
        yield [threads.submit(ask, seed) for seed in range(MANY)]


def test_five_hundred_requests_at_once_are_served(plain: WholeServer) -> None:
    """By default so many may wait."""
    with many_at_once(plain) as answers:
        pass
    told = [answer.result() for answer in answers]
    assert Counter(answer.status for answer in told) == {200: MANY}
    assert {answer.body["usage"]["completion_tokens"] for answer in told} == {2}
    assert plain.ask("Is anybody there?", 4).answered
    health = plain.health()
    assert health["engine_deaths"] == 0
    assert health["memory"]["counts"].get("preempt", 0) == 0


def test_who_finds_the_queue_full_is_told_when_to_come_back(
    wide: Path, measured: dict[str, str], tmp_path: Path
) -> None:
    """One answer is being written and has the only place; twenty wait; all others hear of it at once."""
    flags = ("--max-queue", str(QUEUE), "--decode-concurrency", "1")
    with WholeServer(wide, tmp_path, *flags, environment=measured) as server:
        messages = [{"role": "user", "content": prompt_text(3, 1_000)}]
        endless = post(server.port, {"messages": messages, "stream": True, "temperature": 0})
        until(endless, b'"content":"', 3)
        with many_at_once(server) as answers:
            refused = [found.result() for found in islice(as_completed(answers), MANY - QUEUE)]
            leave(endless, reset=False)
        assert Counter(answer.status for answer in refused) == {503: MANY - QUEUE}
        for answer in refused:
            assert 1 <= int(answer.retry_after or 0) <= 60
            error = answer.body["error"]
            assert error["code"] == "server_busy"
            assert "busy, retry" in error["message"]
            assert "context" not in json.dumps(answer.body)
        assert Counter(answer.result().status for answer in answers)[200] == QUEUE
        assert server.ask("Is anybody there?", 4).answered
        assert server.health()["engine_deaths"] == 0
