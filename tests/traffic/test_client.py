"""The player against a server whose every answer is told beforehand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from penstock.traffic.client import Player, Record, ServerProblem, served_model
from penstock.traffic.profiles import Event, words

Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Any]


def event(turn: int = 0, **fields: Any) -> Event:
    return Event(**{"session": 0, "turn": turn, "pause": 0.0, "system": (("system", 3),),
                    "text": ((f"turn {turn}", 5),), "answer": 8, **fields})  # fmt: skip


def play(events: list[Event], *answers: Answer) -> tuple[list[Record], list[dict[str, Any]]]:
    """The records, and the bodies as the server saw them; the n-th request gets the n-th answer.

    A body's path is put in as "path".
    """
    bodies: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].split("\r\n")[0])
        bodies.append({"path": head.split()[1], **json.loads(await reader.readexactly(length))})
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
            await asyncio.sleep(5)
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
    assert bodies[0]["messages"][1]["content"] == words("turn 0", 5)
    assert bodies[1]["messages"][2]["content"] == "and so"
    assert (bodies[0]["stream"], bodies[0]["max_tokens"], bodies[0]["temperature"]) == (True, 8, 0)
    assert {body["path"] for body in bodies} == {"/v1/chat/completions"}
    assert 0 <= records[0].at < records[0].at + records[0].total <= records[1].at


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


def test_a_client_that_strips_drops_the_first_half_of_each_answer_once() -> None:
    turns = [event(0), event(1), event(2, strip=True), event(3, strip=True)]
    _, bodies = play(turns, *(stream(f"think{n}", f"said0{n}") for n in range(4)))
    said = [[m["content"] for m in body["messages"] if m["role"] == "assistant"] for body in bodies]
    assert said[1] == ["think0said00"]
    assert said[2] == ["said00", "said01"]
    assert said[3] == ["said00", "said01", "said02"]


def test_a_client_that_compacts_keeps_a_summary_and_the_last_two_messages() -> None:
    turns = [event(0), event(1), event(2, summary=(("summary", 4),)), event(3)]
    _, bodies = play(turns, *(stream(f"said {n}") for n in range(4)))
    assert [m["content"] for m in bodies[2]["messages"]] == [
        words("system", 3), words("summary", 4), words("turn 1", 5), "said 1", words("turn 2", 5),
    ]  # fmt: skip
    assert bodies[3]["messages"][:5] == bodies[2]["messages"]


def test_small_requests_have_their_own_form_and_no_history() -> None:
    counted = whole(200, {"input_tokens": 7})

    async def completed(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        last = json.dumps({"choices": [{"text": "fn", "finish_reason": "length"}]})
        writer.write(f"HTTP/1.1 200 OK\r\n\r\ndata: {last}\n\n".encode())

    kinds = [event(n, kind=kind, system=()) for n, kind in enumerate(("count", "fim", "title"))]
    records, bodies = play(kinds, counted, completed, stream("x"))
    assert [(r.kind, r.error) for r in records] == [("count", None), ("fim", None), ("title", None)]
    assert (records[0].prompt_tokens, records[1].text) == (7, "fn")
    paths = [body["path"].removeprefix("/v1") for body in bodies]
    assert paths == ["/messages/count_tokens", "/completions", "/chat/completions"]
    assert "max_tokens" not in bodies[0]
    assert bodies[1]["prompt"] == words("turn 1", 5)
    assert [m["role"] for m in bodies[2]["messages"]] == ["user"]


def test_who_gives_up_at_a_time_comes_no_second_time() -> None:
    records, _ = play([event(leave_at=0.2)], stream("a", hold=True, end=None))
    assert [(r.left, r.error, r.text) for r in records] == [(True, None, "a")]


def test_sessions_come_when_they_should_whoever_is_still_waiting() -> None:
    late = [event(session=n, pause=0.3 * n) for n in range(3)]
    records, _ = play(late, stream("x", hold=True, end=None), stream("x"), stream("x"))
    assert sorted(r.session for r in records[:2]) == [1, 2], "before the first has its answer"
    starts = {r.session: r.at for r in records}
    assert starts[1] >= 0.3
    assert starts[2] >= 0.6


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


def listing(status: int, body: bytes) -> str | None:
    """What is taken for the model of a server that answers GET /models so."""

    async def run() -> str | None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /v1/models HTTP")
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            return await asyncio.to_thread(served_model, url, None)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"data": [{"id": "a/b"}, {"id": "c"}]}', "a/b"),
        (b'{"data": []}', None),
        (b"", None),
        (b"[]", None),
        (b'{"data": [7]}', None),
    ],
)
def test_the_model_is_the_first_that_is_listed(body: bytes, model: str | None) -> None:
    assert listing(200, body) == model


def test_a_server_that_cannot_be_asked_is_one_sentence() -> None:
    with pytest.raises(ServerProblem, match="set OPENAI_API_KEY"):
        listing(401, b"{}")
    with pytest.raises(ServerProblem, match=r"http://127\.0\.0\.1:9/v1 cannot be reached \(.*refused\)"):
        served_model("http://127.0.0.1:9/v1", None)


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
