"""The player against a server whose every answer is told beforehand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from penstock.traffic.client import Player, Record
from penstock.traffic.profiles import Event, words

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Any]


def event(turn: int = 0, **fields: Any) -> Event:
    return Event(**{"session": 0, "turn": turn, "pause": 0.0, "shared": 3, "block": 1 + turn, "new": 5,
                    "answer": 8, **fields})  # fmt: skip


def play(events: list[Event], *answers: Answer) -> tuple[list[Record], list[dict[str, Any]]]:
    """The records, and the bodies as the server saw them; the n-th request gets the n-th answer."""
    bodies: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].split("\r\n")[0])
        bodies.append(json.loads(await reader.readexactly(length)))
        try:
            await answers[len(bodies) - 1](bodies[-1], writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def run() -> list[Record]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.to_thread(Player(f"http://127.0.0.1:{port}/v1", "m").play, events)

    return asyncio.run(run()), bodies


def whole(status: int = 200, body: Any = None, *headers: str) -> Answer:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    content = body or {"choices": [{"message": {"content": "so"}}], "usage": usage}

    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        data = json.dumps(content).encode()
        lines = "".join(line + "\r\n" for line in headers)
        writer.write(f"HTTP/1.1 {status} X\r\n{lines}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    return answer


def stream(*pieces: str, end: str | None = "stop", cut: bool = False, hold: bool = False) -> Answer:
    """Chunked events, each chunk broken in two; `cut`: without the last chunk; `hold`: never goes on."""

    async def answer(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        if end:
            events.append({"choices": [{"delta": {}, "finish_reason": end}]})
        events.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(pieces)}})
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for data in [f": keep\n\ndata: {json.dumps(e)}\n\n".encode() for e in events] + [b"data: [DONE]\n\n"]:
            for half in (data[:11], data[11:]):
                writer.write(f"{len(half):x}\r\n".encode() + half + b"\r\n")
            await writer.drain()
        if hold:
            await asyncio.sleep(30)
        if not cut:
            writer.write(b"0\r\n\r\n")

    return answer


def test_a_session_sends_its_whole_history_with_the_servers_own_answers() -> None:
    records, bodies = play([event(0), event(1)], stream("and", " so"), stream("on"))
    assert [r.error for r in records] == [None, None]
    assert records[0].text == "and so"
    assert (records[0].prompt_tokens, records[0].answer_tokens, len(records[0].gaps)) == (9, 2, 1)
    assert [m["role"] for m in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert bodies[1]["messages"][:2] == bodies[0]["messages"]
    assert bodies[0]["messages"][1]["content"] == words(1, 5)
    assert bodies[1]["messages"][2]["content"] == "and so"
    assert (bodies[0]["stream"], bodies[0]["max_tokens"]) == (True, 8)


def test_who_hangs_up_in_prefill_comes_back_with_the_same_request() -> None:
    left = event(leave_in_prefill=0.5, back_after=0.0, back_streams=False)
    records, bodies = play([left], stream(hold=True, end=None), whole())
    assert [(r.left, r.again, r.error) for r in records] == [(True, False, None), (False, True, None)]
    assert bodies[0]["messages"] == bodies[1]["messages"]
    assert bodies[1]["stream"] is False
    assert (records[1].text, records[1].cached_tokens) == ("so", 4)


def test_who_hangs_up_in_mid_stream_has_had_that_many_pieces() -> None:
    records, bodies = play([event(leave_after=2), event(1)], stream(*"abcdef", hold=True), stream("x"))
    assert (records[0].left, records[0].text) == (True, "ab")
    assert bodies[1]["messages"][2]["content"] == "ab"


def test_a_busy_server_is_asked_again_when_it_says_so() -> None:
    busy = whole(503, {"error": {"code": "server_busy"}}, "Retry-After: 0")
    records, _ = play([event()], busy, busy, stream("x"))
    assert [(r.error, r.again) for r in records] == [
        ("503 server_busy", False), ("503 server_busy", True), (None, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (whole(400, {"error": {"code": "context_length_exceeded"}}), "400 context_length_exceeded"),
        (whole(404, {"error": "no"}), "404"),
        (whole(503, {"error": {"code": "engine_halted"}}), "503 engine_halted"),
        (whole(500, ["?"]), "500"),
        (stream("x", end=None), "incomplete"),
        (stream("x", cut=True), "broken"),
    ],
)
def test_every_failure_has_its_name(answer: Answer, error: str) -> None:
    records, _ = play([event()], answer)
    assert [r.error for r in records] == [error]


def test_an_error_event_and_a_server_that_is_gone() -> None:
    async def failing(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"code": "engine_died"}}\n\n')

    async def silent(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.close()

    assert play([event()], failing)[0][0].error == "stream: engine_died"
    assert play([event()], silent)[0][0].error == "broken"
    gone = Player("http://127.0.0.1:9/v1", "m").play([event()])
    assert [r.error for r in gone] == ["refused"]


def test_words_are_fitted_to_the_servers_tokenizer() -> None:
    """Two words a token: half as many words would be too few."""

    async def count(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = len(body["messages"][0]["content"].split()) // 2 + 17
        usage = {"prompt_tokens": number, "completion_tokens": 1}
        await whole(200, {"choices": [{"message": {"content": ""}}], "usage": usage})(body, writer)

    bodies: list[int] = []

    async def run() -> float:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].split("\r\n")[0])
            await count(json.loads(await reader.readexactly(length)), writer)
            bodies.append(length)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            player = Player(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "m")
            await asyncio.to_thread(player.fit_words)
            return player.words_per_token

    assert asyncio.run(run()) == 2.0
    assert len(bodies) == 2
