"""The load generator's reading of an answer: chunks and events cut anywhere, each at the time of its end."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import load


def _event(content: str | None = None, finish: str | None = None, usage: dict | None = None) -> bytes:
    choices = [] if usage else [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


EVENTS = [
    _event(""),
    _event("ab"),
    b": keepalive\n\n",
    _event(" cd ef"),
    _event("", "length"),
    _event(usage={"completion_tokens": 3}),
    b"data: [DONE]\n\n",
]
PLAIN = b"HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@given(cuts=st.sets(st.integers(1, 700), max_size=12))
def test_any_cut_reads_the_same(chunked: bool, cuts: set[int]) -> None:
    whole = (CHUNKED + b"".join(map(_chunk, EVENTS)) + _chunk(b"")) if chunked else PLAIN + b"".join(EVENTS)
    borders = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    pieces = [(float(b), whole[a:b]) for a, b in pairwise(borders)]
    answer = load.digest(-1.0, pieces)
    ends = [whole.index(event) + len(event) for event in (EVENTS[1], EVENTS[3])]
    stamps = [next(b for b in borders if b >= end) for end in ends]
    assert answer.arrivals == [stamps[0], stamps[1], stamps[1]]
    assert (answer.status, answer.complete, answer.finish_reason, answer.events) == (200, True, "length", 2)
    assert answer.usage == {"completion_tokens": 3}


def test_a_cut_stream_is_not_complete() -> None:
    answer = load.digest(0.0, [(1.0, PLAIN + EVENTS[1])])
    assert (answer.complete, len(answer.arrivals)) == (False, 1)


def test_an_error_is_kept() -> None:
    answer = load.digest(0.0, [(1.0, b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy")])
    assert (answer.status, answer.error) == (503, "busy")
    late = load.digest(0.0, [(1.0, PLAIN + b'data: {"error": {"code": "engine_died"}}\n\n')])
    assert late.error == '{"code": "engine_died"}'


def test_requests_go_out_together_and_answers_keep_their_order() -> None:
    async def scenario() -> list[load.Answer]:
        arrived: list[bytes] = []
        both = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            arrived.append(body)
            if len(arrived) == 2:
                both.set()
            await both.wait()
            writer.write(PLAIN + _event(" ab" * body["n"]) + EVENTS[-1])
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            requests = [{"path": "/v1/chat/completions", "body": {"n": n}} for n in (1, 2)]
            return await load.run({"host": "127.0.0.1", "port": port, "requests": requests})

    answers = asyncio.run(scenario())
    assert [len(answer.arrivals) for answer in answers] == [1, 2]
    assert all(answer.complete and answer.arrivals[0] >= answer.sent for answer in answers)
