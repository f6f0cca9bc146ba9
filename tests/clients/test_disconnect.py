"""Clients that go away, at every stage of a request, and the rows they leave behind: none."""

from __future__ import annotations

import json
import socket
import urllib.request

import pytest
from tests.support.serve_scripted import ScriptedServer

STAGES = {
    "queued": ({"queued": 60}, "submit"),
    "prefill": ({"prefill": 60}, "submit"),
    "decode": ({"step": 0.05}, "joined"),
}


def send(server: ScriptedServer, body: dict, path: str = "/v1/chat/completions") -> socket.socket:
    """A request on a connection of its own, which stays open."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """What is received up to `end`, or to the connection's."""
    received = b""
    while end not in received and (part := connection.recv(65536)):
        received += part
    return received


def ask(word: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": word}], **more}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_goes_away(server: ScriptedServer, stage: str, stream: bool, how: str) -> None:
    rule, event = STAGES[stage]
    server.rules({"when": "leaving", "pieces": [" ab"] * 2000, **rule})
    before = len(server.events(event))
    connection = send(server, ask("leaving", stream=stream))
    seen = server.until(lambda: server.events(event)[before:])[0]
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()
    end = server.until(lambda: [e for e in server.events("end") if e["id"] == seen["id"]])[0]
    assert end["known"]
    server.rules({"when": "next", "pieces": ["served"]})
    with send(server, ask("next")) as following:
        assert b'"served"' in read_until(following, b'"usage"')


def test_other_rows_go_on(server: ScriptedServer) -> None:
    server.rules(
        {"when": "leaving", "pieces": [" ab"] * 2000, "step": 0.02},
        {"when": "staying", "pieces": [" cd"] * 40, "step": 0.02},
    )
    leaving, staying = send(server, ask("leaving", n=2, stream=True)), send(server, ask("staying"))
    server.until(lambda: len([e for e in server.events("submit") if e["rule"] == "leaving"][-2:]) == 2)
    rows = {event["id"] for event in server.events("submit")[-3:] if event["rule"] == "leaving"}
    leaving.close()
    server.until(lambda: rows <= {event["id"] for event in server.events("end")})
    with staying:
        assert b" cd" * 40 in read_until(staying, b'"usage"')


def test_a_client_that_does_not_read_holds_nobody_up(server: ScriptedServer) -> None:
    server.rules({"when": "deaf", "pieces": [" ab"] * 20_000}, {"when": "", "pieces": ["quick"]})
    with send(server, ask("deaf", stream=True)), send(server, ask("other")) as other:
        assert b'"quick"' in read_until(other, b'"usage"')


def test_health_says_that_nothing_is_left(server: ScriptedServer) -> None:
    def nothing_open() -> bool:
        with urllib.request.urlopen(server.url + "/health", timeout=5) as answer:
            return "open" not in (found := json.loads(answer.read())) or found["open"] == 0

    server.until(nothing_open)
    assert "Traceback" not in server.log()
