"""The load generator, in a process of its own: sends requests, stamps each piece of the answers' bytes.

Owns nothing but sockets: while answers flow it only appends (time, bytes); HTTP chunks and events are taken
apart after the last byte. stdin: {"host", "port", "requests": [{"path", "body", "late"}]}, a late
request being sent when the first one's answer has begun; stdout: one answer per request, in order. Times are
`time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

_SAID = re.compile(rb'"(?:content|text)": ?"[^"]')
CHARS_PER_ID = 3
"""Every id of bench.models' vocabulary is a space and two letters (the first answer may lack its space)."""


@dataclass
class Answer:
    """One streamed answer: when it was sent and when each of its ids arrived (coalesced ids share a time)."""

    sent: float
    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    events: int = 0
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    complete: bool = False
    error: str | None = None


class _Stream(asyncio.Protocol):
    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self.request, self.done = request, done
        self.pieces: list[tuple[float, bytes]] = []
        self.sent = 0.0
        self.transport: asyncio.BaseTransport | None = None
        self.talking = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.sent = time.monotonic()
        transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.monotonic(), data))
        if not self.talking.is_set() and _SAID.search(data):
            self.talking.set()
        if data.endswith((b"data: [DONE]\n\n", b"0\r\n\r\n")):
            self.transport.close()  # type: ignore[union-attr]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def unchunk(pieces: list[tuple[float, bytes]]) -> tuple[int, list[tuple[float, bytes]]]:
    """Status and the body's (time, bytes) of an HTTP/1.x answer; a byte's time is its piece's."""
    raw = b"".join(data for _, data in pieces)
    head, separator, body = raw.partition(b"\r\n\r\n")
    if not separator:
        return 0, []
    starts, position = [], 0
    for stamp, data in pieces:
        starts.append((position, stamp))
        position += len(data)
    offset = len(head) + 4
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in head.lower():
        return status, _stamped(body, offset, starts)
    parts, at = [], 0
    while True:
        line_end = body.find(b"\r\n", at)
        if line_end < 0 or (size := int(body[at:line_end].split(b";")[0], 16)) == 0:
            return status, parts
        data_at = line_end + 2
        parts += _stamped(body[data_at : data_at + size], offset + data_at, starts)
        at = data_at + size + 2


def _stamped(data: bytes, offset: int, starts: list[tuple[int, float]]) -> list[tuple[float, bytes]]:
    """`data`, which begins at byte `offset` of the answer, cut where the pieces began."""
    cuts = [(max(position - offset, 0), stamp) for position, stamp in starts if position < offset + len(data)]
    return [
        (stamp, part)
        for i, (cut, stamp) in enumerate(cuts)
        if (part := data[cut : cuts[i + 1][0] if i + 1 < len(cuts) else len(data)])
    ]


def read_events(parts: list[tuple[float, bytes]]) -> list[tuple[float, str]]:
    """The `data:` payloads of a server-sent event stream, each at the time of its last byte."""
    events, pending = [], b""
    for stamp, data in parts:
        pending += data
        *whole, pending = pending.split(b"\n\n")
        events += [
            (stamp, line[5:].strip().decode())
            for block in whole
            for line in block.split(b"\n")
            if line.startswith(b"data:")
        ]
    return events


def digest(sent: float, pieces: list[tuple[float, bytes]]) -> Answer:
    """What a stream's bytes say."""
    answer = Answer(sent)
    answer.status, parts = unchunk(pieces)
    if answer.status != 200:
        answer.error = b"".join(data for _, data in parts).decode(errors="replace")[:500] or "no answer"
        return answer
    for stamp, payload in read_events(parts):
        if payload == "[DONE]":
            answer.complete = True
            continue
        event = json.loads(payload)
        if event.get("error"):
            answer.error = json.dumps(event["error"])
        answer.usage = event.get("usage") or answer.usage
        for choice in event.get("choices", []):
            text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            if text:
                answer.events += 1
                answer.arrivals += [stamp] * round(len(text) / CHARS_PER_ID)
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    return answer


async def run(spec: dict[str, Any]) -> list[Answer]:
    """Sends every request of the spec, the late ones once the first answers, and waits for all answers."""
    loop = asyncio.get_running_loop()
    first: asyncio.Future[_Stream] = loop.create_future()

    async def one(request: dict[str, Any]) -> _Stream:
        if request.get("late"):
            await (await first).talking.wait()
        body = json.dumps(request["body"]).encode()
        head = (
            f"POST {request['path']} HTTP/1.1\r\nHost: {spec['host']}:{spec['port']}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        done: asyncio.Future[None] = loop.create_future()
        _, stream = await loop.create_connection(
            lambda: _Stream(head.encode() + body, done), spec["host"], spec["port"]
        )
        if not first.done():
            first.set_result(stream)
        await done
        stream.talking.set()
        return stream

    streams = await asyncio.gather(*map(one, spec["requests"]))
    return [digest(stream.sent, stream.pieces) for stream in streams]


if __name__ == "__main__":
    json.dump([asdict(answer) for answer in asyncio.run(run(json.load(sys.stdin)))], sys.stdout)
