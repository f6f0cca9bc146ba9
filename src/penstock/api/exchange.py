"""One HTTP request and its response, on plain ASGI: no per-chunk middleware.

Owns `receive` and `send` of the exchange. Invariant: `receive` has one reader at a time, first the body's,
then the watcher's, which notices that the client has left and cancels the handler wherever it waits.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.errors import PenstockError

Header = tuple[bytes, bytes]
JSON = b"application/json"


class ClientGone(Exception):
    """The client has left; nobody is there to be told anything."""


class Exchange:
    """A request, and what has been answered so far."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.id = secrets.token_hex(12)
        self.name = self.id[:8]
        self.namespace = ""
        """The prompt cache that it may see: its key's."""
        self.status = 0
        self.started = False
        self.complete = False
        self.extra: list[Header] = [(b"x-request-id", self.id.encode())]
        self.receive = receive
        self.send = send
        self._gone = False
        self._owner: asyncio.Task[Any] | None = None

    def header(self, name: bytes) -> bytes:
        """The first header of that name (lower case), or nothing."""
        return next(iter(self.header_values(name)), b"")

    def header_values(self, name: bytes) -> list[bytes]:
        """All headers of that name."""
        return [value for key, value in self.scope["headers"] if key == name]

    async def receive_body(self) -> tuple[bytes, bool]:
        """The next part of the body and whether more comes. Raises ClientGone."""
        message = await self.receive()
        if message["type"] != "http.request":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)

    @contextmanager
    def ends_with_client(self) -> Iterator[None]:
        """Inside, a client that leaves cancels this task; outside that is a ClientGone."""
        self._owner = asyncio.current_task()
        watcher = asyncio.create_task(self._watch())
        try:
            yield
        except asyncio.CancelledError:
            if not self._gone:
                raise
            assert self._owner is not None
            self._owner.uncancel()
            raise ClientGone from None
        finally:
            watcher.cancel()
            self._owner = None

    async def _watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        if self._owner is not None and not self.complete:
            self._gone = True
            self._owner.cancel()

    def cut(self) -> None:
        """Drop a connection whose client doesn't read. ASGI has no word for it, and closing waits."""
        transport = getattr(getattr(self.send, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()

    async def respond(
        self, status: int, body: bytes, *, media: bytes = JSON, headers: list[Header] | None = None
    ) -> None:
        """The whole response at once."""
        fixed = [(b"content-type", media), (b"content-length", b"%d" % len(body))]
        if status in (204, 304):  # neither has a body, nor a word on its length
            fixed = []
        await self._start(status, fixed + (headers or []))
        self.complete = True
        await self.send({"type": "http.response.body", "body": body})

    async def respond_json(self, status: int, value: Any, *, headers: list[Header] | None = None) -> None:
        """`value` encoded by msgspec."""
        await self.respond(status, msgspec.json.encode(value), headers=headers)

    async def respond_error(self, error: PenstockError, headers: list[Header] | None = None) -> None:
        """The one place where an error becomes a response."""
        row = error.kind.value
        headers = list(headers or [])
        if row.retryable:
            headers.append((b"retry-after", b"%d" % (error.retry_after or 1)))
        elif row.status >= 500:
            headers.append((b"x-should-retry", b"false"))
        body = error.anthropic() if self.path.startswith("/v1/messages") else error.openai()
        await self.respond_json(row.status, body, headers=headers)

    async def start_stream(self) -> None:
        """The headers of an event stream; they leave at once."""
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.started, self.status = True, status
        await self.send({"type": "http.response.start", "status": status, "headers": headers + self.extra})
