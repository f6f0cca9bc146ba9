"""The least HTTP/1.1 that playing traffic needs: one POST a connection, the answer's body in pieces.

Owns the connection it opens: it is gone when the generator ends or is closed, which is also how a client
hangs up. Refuses what is no HTTP answer with `Broken`, as it does a body that ends early.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

HEAD_LIMIT = 1 << 20


class Broken(Exception):
    """The answer ended before its end, or was none."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers, names in lower case."""

    status: int
    headers: Mapping[str, str]


Answer = AsyncGenerator[Head | bytes, None]


async def post(url: str, body: Any, headers: Mapping[str, str]) -> Answer:
    """The answer's head, then its body as it comes. Raises OSError, Broken."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(
        parts.hostname,
        parts.port or (443 if secure else 80),
        ssl=ssl.create_default_context() if secure else None,
        limit=HEAD_LIMIT,
    )
    try:
        payload = json.dumps(body).encode()
        lines = {
            "Host": parts.netloc,
            "Content-Type": "application/json",
            "Content-Length": str(len(payload)),
            "Connection": "close",
            **headers,
        }
        head = f"POST {parts.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        writer.write(head.encode() + b"\r\n" + payload)
        answer = await _head(reader)
        yield answer
        if answer.headers.get("transfer-encoding", "").lower() == "chunked":
            async for piece in _chunks(reader):
                yield piece
        else:
            length = answer.headers.get("content-length")
            yield await (reader.read() if length is None else reader.readexactly(int(length)))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
        raise Broken(type(error).__name__) from error
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> Head:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Head(int(first.split(" ")[1]), headers)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
