"""uvicorn's HTTP protocol with deadlines and bounds for what a client sends: no connection is for free.

Owns one timer per connection: until the headers are there, then the body's pace, then what still arrives of a
body that was refused. Refuses headers that are late or large, bodies that trickle, and connections beyond a
number, of which the longest idle one goes first. Ignores offers of other protocols. Answers itself only where
no handler runs yet or one waits for the body. Invariant: between requests and while one arrives, a timer is
running.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from penstock import log, platform
from penstock.errors import Kind, PenstockError

DESCRIPTORS = 8192
"""File descriptors that the process asks the system for."""
SPARE_DESCRIPTORS = 64
"""Of those, what connections leave to everything else."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Times in seconds, sizes in bytes."""

    headers: float = 10.0
    head_size: int = 65_536
    body_look: float = 20.0
    """The body's pace is looked at in this interval, and must be at least `pace` over it."""
    pace: float = 512.0
    linger: float = 5.0
    """For the rest of a body whose request has been answered."""
    connections: int = 4096
    vanished: int = 120
    """Without a sign of the client's machine."""


def room_for_connections(bounds: Bounds) -> Bounds:
    """Ask the system for more descriptors, and let in no more connections than it then allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return bounds
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    with contextlib.suppress(OSError, ValueError):  # Darwin has a limit of its own below the hard one
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        soft = max(soft, wanted)
    return replace(bounds, connections=max(1, min(bounds.connections, soft - SPARE_DESCRIPTORS)))


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, bounds: Bounds | None = None, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self._bounds = bounds or Bounds()
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head = 0
        self._body = 0
        self._messages = 0
        self._idle_since = self.loop.time()

    @property
    def idle(self) -> bool:
        """No request is being answered, and none has been read to its headers' end."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        platform.notice_vanished_peer(transport.get_extra_info("socket"), self._bounds.vanished)
        if len(self.connections) > self._bounds.connections and not self._make_room():
            self._refuse(Kind.BUSY, "The server is busy, retry: too many connections are open.")
            return
        self._wait_for_head()

    def _make_room(self) -> bool:
        """End the connection that has been idle for longest, if there is one."""
        others = [c for c in self.connections if isinstance(c, BoundedProtocol) and c is not self]
        others = [c for c in others if not c.transport.is_closing()]
        if len(others) < self._bounds.connections:
            return True
        longest = min((c for c in others if c.idle), key=lambda c: c._idle_since, default=None)
        if longest is not None:
            longest.transport.abort()
        return longest is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before, self._unread = self._messages, data
        super().data_received(data)
        while data is not self._unread:  # an offer of another protocol was taken out of it
            data = self._unread
            super().data_received(data)
        self._unread = b""
        if self._in_head and self._messages == before:
            self._head += len(data)
            if self._head > self._bounds.head_size:
                most = self._bounds.head_size
                self._refuse(Kind.HEADERS_TOO_LARGE, f"Headers are limited to {most:,} bytes.")
            elif self._timer is None:
                self._wait_for_head()

    def _should_upgrade(self) -> bool:
        return any(name == b"upgrade" for name, _ in self.headers)

    def handle_websocket_upgrade(self) -> None:
        """Ignore an offer of any other protocol: a parser leaves out the body of a head that has one."""
        end = sys.exception().args[0]  # type: ignore[union-attr]  # of the head, in what was read last
        kept = (b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
        method, version = self.scope["method"].encode(), self.scope["http_version"].encode()
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(kept))
        self._unread = head + self._unread[end:]
        self.parser = type(self.parser)(self)  # the old one takes in nothing more after 'Connection: close'
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head = True, 0

    def on_headers_complete(self) -> None:
        self._in_head, self._body = False, 0
        super().on_headers_complete()
        self._set_timer(self._bounds.body_look, self._look_at_body, 0)

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_timer()
        self._in_head, self._head = True, 0
        self._messages += 1

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()
        if not self._in_head and not self.transport.is_closing():
            self._set_timer(self._bounds.linger, self.transport.abort)

    def _wait_for_head(self) -> None:
        self._set_timer(self._bounds.headers, self._head_is_late)

    def _head_is_late(self) -> None:
        self._timer = None
        if not self.idle:
            return  # the request before is still being answered: its client may send the next one slowly
        if self._head:
            limit = self._bounds.headers
            self._refuse(Kind.TIMEOUT, f"The request's headers did not arrive in {limit:g} s.")
        else:
            self.transport.close()

    def _look_at_body(self, before: int) -> None:
        self._timer = None
        if self._in_head:
            return
        slow = self._body - before < self._bounds.pace * self._bounds.body_look
        if slow and not self.flow.read_paused:
            self._refuse(Kind.TIMEOUT, "The request's body arrives too slowly.")
        else:
            self._set_timer(self._bounds.body_look, self._look_at_body, self._body)

    def _refuse(self, kind: Kind, message: str) -> None:
        """Answer where no handler has, and end the connection."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        log.repeated(kind.label, f"refused a connection: {kind.label}")
        if self.idle or not self.cycle.response_started:
            error = PenstockError(kind, message)
            body = msgspec.json.encode(error.openai())
            retry = b"retry-after: %d\r\n" % error.retry_after if error.retry_after else b""
            head = STATUS_LINE[kind.value.status] + retry + b"content-type: application/json\r\n"
            head += b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.transport.write(head + body)
        self.transport.close()

    def _set_timer(self, seconds: float, act: Any, *arguments: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, act, *arguments)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
