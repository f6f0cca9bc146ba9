"""Clients that go away or don't read, and streams with nothing to say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from typing import Any

import pytest
from tests.support.fake_backend import BLOB_ID, Server, say, serving, wait_until
from tests.support.hang_ups import vanish

from penstock.api.protocol import Bounds
from penstock.api.service import Timing

PATIENT = Timing()
HASTY = Timing(keepalive=0.05, body=0.2, stalled_reader=0.3)


def post(server: Server, path: str = "/v1/chat/completions", **fields: Any) -> socket.socket:
    """A request in flight."""
    if path.endswith("chat/completions"):
        fields = {"messages": [{"role": "user", "content": "hi"}]} | fields
    body = json.dumps(fields).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = (
        "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    )
    connection.sendall(head.format(path, len(body)).encode() + body)
    return connection


def until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connection.recv(65536)
        assert part, received
        received += part
    return received


async def silent(run: Any) -> None:
    """Neither tokens nor an end."""


async def prefilling(run: Any) -> None:
    while run.ended == {}:
        run.ticket.put_progress(0, 1, 2)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("script", [silent, prefilling, say("word ", forever=True, pause=0.01)])
def test_a_client_that_leaves_ends_its_job_quietly(
    stream: bool, path: str, script: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    prompt = {} if "chat" in path else {"prompt": ["a", "b"]}
    with serving(script) as server:
        connection = post(server, path, stream=stream, **prompt)
        wait_until(lambda: len(server.backend.runs) == max(1, len(prompt.get("prompt", ()))))
        connection.close()
        wait_until(lambda: all(run.ended for run in server.backend.runs))
    said = [
        record
        for record in caplog.records
        if record.name.startswith(("penstock", "uvicorn.error", "asyncio"))
    ]
    said = [record for record in said if record.levelname != "INFO" or "client gone" in record.message]
    said = [record for record in said if "refused" not in record.message]  # other tests', summed late
    assert [record.levelname for record in said] == ["INFO"]
    assert not any(record.exc_info for record in said)


def test_a_client_that_leaves_while_the_model_loads() -> None:
    with serving() as server:
        server.on_loop(lambda: server.backend.become("loading"))
        connection = post(server)
        wait_until(lambda: server.service.admission.open == 1)
        connection.close()
        wait_until(lambda: server.service.admission.open == 0)
        server.on_loop(lambda: server.backend.become("ready"))
        assert server.backend.runs == []


def test_headers_and_role_come_before_the_first_token() -> None:
    with serving(silent) as server, contextlib.closing(post(server, stream=True)) as connection:
        received = until(connection, b'"role":"assistant"')
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding: chunked" in received
    with (
        serving(silent) as server,
        contextlib.closing(post(server, "/v1/completions", prompt="a", stream=True)) as connection,
    ):
        assert until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")


def test_silence_is_filled_in_each_apis_way() -> None:
    with serving(silent, timing=HASTY) as server:
        with contextlib.closing(post(server, stream=True)) as connection:
            until(connection, b'"role":"assistant"')
            for _ in range(3):
                assert b'"delta":{},"logprobs":null,"finish_reason":null' in until(connection, b'"delta":{}')
        with contextlib.closing(post(server, "/v1/completions", prompt="a", stream=True)) as connection:
            until(connection, b": waiting\n\n")


def test_a_talking_stream_needs_no_keepalive() -> None:
    script = say(*["word "] * 40, pause=0.005)
    with (
        serving(script, timing=Timing(keepalive=5.0)) as server,
        contextlib.closing(post(server, stream=True)) as connection,
    ):
        received = until(connection, b"[DONE]")
    assert received.count(b'"delta":{}') == 1  # the finish


def test_a_body_that_does_not_come_is_a_timeout() -> None:
    with serving(timing=HASTY) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b'Content-Length: 100\r\n\r\n{"prompt":')
        received = until(connection, b"}")
        connection.close()
    assert b" 408 " in received[:20]
    assert b'"request_timeout"' in received


def test_a_client_that_does_not_read_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Its answer backs up to uvicorn's limit, then waits, merged, in the ticket; then it is given up."""
    script = say([BLOB_ID] * 50, forever=True, pause=0.001)
    with serving(script, timing=HASTY) as server:
        connection = post(server, stream=True)
        wait_until(lambda: len(server.backend.runs) == 1)
        (run,) = server.backend.runs
        wait_until(lambda: run.ended != {})
        connection.close()
    assert "Exception" not in caplog.text
    assert "without completing" not in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="a filter drops the client's packets")
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [silent, say("word ", forever=True, pause=0.01)])
def test_a_client_whose_machine_vanished_is_found_out(
    stream: bool, script: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It never says so; nothing that is sent to it comes back, or nothing answers the system's probes."""
    with serving(script, timing=HASTY, bounds=Bounds(vanished=1)) as server:
        with contextlib.closing(post(server, stream=stream)) as connection:
            wait_until(lambda: len(server.backend.runs) == 1)
            vanish(connection)
            wait_until(lambda: server.backend.runs[0].ended != {})
            wait_until(lambda: server.service.admission.open == 0)
        assert not server.on_loop(lambda: server.server.server_state.connections)
    assert "Exception" not in caplog.text


def test_a_slow_reader_gets_everything() -> None:
    parts = [f"{n:05d}" for n in range(3000)]
    with (
        serving(say(*parts), timing=Timing(keepalive=0.05)) as server,
        contextlib.closing(post(server, stream=True)) as connection,
    ):
        wait_until(lambda: bool(server.backend.runs) and server.backend.runs[0].ticket.closed)
        received = until(connection, b"[DONE]")
    data = [line[6:] for line in received.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data: {")]
    contents = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in data]
    assert "".join(contents) == "".join(parts)


def test_a_connection_is_used_again() -> None:
    with serving() as server, contextlib.closing(post(server, stream=True)) as connection:
        until(connection, b"0\r\n\r\n")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in until(connection, b"}}")
