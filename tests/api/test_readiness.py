"""Models, health, the schema; what waits while the model loads; and the front's memory."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from tests.support.fake_backend import Server, say, serving, wait_until

from penstock.api.admission import Admission
from penstock.errors import Kind, PenstockError

BODY = {"messages": [{"role": "user", "content": "hi"}]}


def test_models() -> None:
    with serving() as server, server.client() as client:
        listed = client.get("/v1/models?").json()
        one = client.get("/v1/models/org/fake").json()
        escaped = client.get("/v1/models/org%2Ffake").json()
        server.on_loop(lambda: server.backend.become("loading"))
        loading = client.get("/v1/models/alias").json()
        head = client.head("/")
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["org/fake", "alias"]
    assert one == escaped == listed["data"][0]
    assert one == {
        "id": "org/fake",
        "object": "model",
        "created": server.service.created,
        "owned_by": "penstock",
        "max_model_len": 4096,
    }
    assert "max_model_len" not in loading
    assert head.status_code == 200
    assert head.content == b""


def test_openapi() -> None:
    with serving() as server, server.client() as client:
        document = client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert "/v1/chat/completions" in document["paths"]


@pytest.mark.parametrize("state", ["downloading", "loading", "restarting", "halted", "stopping"])
def test_health_of_an_unready_engine(state: str) -> None:
    with serving() as server, server.client() as client:
        server.on_loop(lambda: server.backend.become(state, "why"))
        unready = client.get("/health")
        server.on_loop(lambda: server.backend.become("ready"))
        ready = client.get("/health")
    assert (unready.status_code, unready.json()["status"], unready.json()["reason"]) == (503, state, "why")
    assert (ready.status_code, ready.json()["status"], ready.json()["batch_mode"]) == (200, "ok", "ragged")


def test_requests_wait_for_the_engine() -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        with server.client() as client:
            answers.append(client.post("/v1/chat/completions", json=BODY))

    with serving() as server:
        server.on_loop(lambda: server.backend.become("loading"))
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.service.admission.open == 3)
        assert answers == []
        server.on_loop(lambda: server.backend.become("ready"))
        for thread in threads:
            thread.join(10)
    assert [answer.status_code for answer in answers] == [200] * 3


def test_a_halted_engine_is_said_at_once() -> None:
    with serving() as server, server.client() as client:
        server.on_loop(lambda: server.backend.become("halted", "no weights"))
        answer = client.post("/v1/chat/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_halted")
    assert answer.headers["x-should-retry"] == "false"
    assert "no weights" in answer.json()["error"]["message"]


def test_beyond_the_fronts_memory_requests_are_told_to_retry_if_that_can_help() -> None:
    with serving(say("x"), front_memory=200_000) as server, server.client() as client:
        small = client.post("/v1/chat/completions", json=BODY)
        while server.service.admission.open:  # its share is given back just behind the answer
            time.sleep(0.01)
        with server.service.admission.lease() as others:
            others.resize(150_000)
            busy = client.post("/v1/chat/completions", json=BODY)
        big = client.post("/v1/chat/completions", json={**BODY, "padding": "x" * 100_000})
        many = client.post("/v1/chat/completions", json={**BODY, "n": 3})
    assert [small.status_code, busy.status_code, big.status_code, many.status_code] == [200, 503, 413, 413]
    assert busy.json()["error"]["code"] == "server_busy"
    assert int(busy.headers["retry-after"]) >= 1
    assert "context" not in busy.json()["error"]["message"]


def test_the_account_is_exact() -> None:
    account = Admission(100_000)
    with account.lease() as first:
        first.resize(60_000)
        with pytest.raises(PenstockError) as caught, account.lease() as second:
            second.resize(50_000)
        assert caught.value.kind is Kind.BUSY
        assert account.held == 60_000
        first.resize(200_000, refuse=False)
        first.resize(150_000)
        assert account.held == 150_000
        with pytest.raises(PenstockError):
            account.lease()
        assert account.open == 1
    assert (account.held, account.open) == (0, 0)


def test_a_long_answer_that_is_collected_is_counted() -> None:
    seen: list[int] = []

    async def long(run: object) -> None:
        await say(*["x" * 50_000] * 8)(run)  # type: ignore[arg-type]

    def watch(server: Server) -> None:
        resize = type(server.service.admission.lease()).resize
        assert resize is not None

    with serving(long) as server, server.client() as client:
        account = server.service.admission
        original = account.lease

        def lease() -> object:
            made = original()
            inner = made.resize

            def resize(size: int, *, refuse: bool = True) -> None:
                seen.append(size)
                inner(size, refuse=refuse)

            made.resize = resize  # type: ignore[method-assign]
            return made

        account.lease = lease  # type: ignore[assignment, method-assign]
        answer = client.post("/v1/completions", json={"prompt": "a"})
    assert len(answer.json()["choices"][0]["text"]) == 400_000
    assert max(seen) > 400_000
