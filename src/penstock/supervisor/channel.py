"""The front's end of the socketpair, on its event loop.

Messages of one read are handed over one by one in order; the end of the stream is the engine's death notice
and comes once, after them. Nothing here waits: `send` leaves to the transport what the socket does not take,
and `writable` asks the owner to hold large messages back while that is much.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import msgspec

from penstock import wire
from penstock.pipe import CHUNK, Frames

OUTGOING_BOUND = 4 << 20


class FrontChannel(asyncio.BufferedProtocol):
    """One engine's channel. Callbacks: `on_message(message)`, `on_closed(error)`, `on_writable()`."""

    def __init__(
        self,
        on_message: Callable[[wire.ToFront], None],
        on_closed: Callable[[str | None], None],
        on_writable: Callable[[], None],
    ) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._on_writable = on_writable
        self._frames = Frames()
        # Read into one buffer: a fresh one of this size costs more than all the rest of a small read.
        self._buffer = memoryview(bytearray(CHUNK))
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []
        self._closed = False
        self._paused = False
        self._error: str | None = None

    async def connect(self, sock: socket.socket) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, sock=sock)

    @property
    def writable(self) -> bool:
        """False: more than OUTGOING_BOUND bytes wait; `on_writable` will be called."""
        return not self._paused and not self._closed

    def send(self, message: wire.ToEngine) -> None:
        """Never waits. What a dead engine can no longer take is dropped."""
        if self._closed:
            return
        if self._transport is None:
            self._unsent.append(wire.encode(message))
        else:
            self._transport.write(wire.encode(message))

    def close(self) -> None:
        """No callback comes after this."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._closed:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=OUTGOING_BOUND)
        for frame in self._unsent:
            transport.write(frame)
        self._unsent.clear()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for body in self._frames.feed(self._buffer[:nbytes]):
                if self._closed:
                    return
                self._on_message(wire.decode_to_front(body))
        except (msgspec.DecodeError, ValueError) as error:
            self._error = f"it sent what is no message ({error})"
            if self._transport is not None:
                self._transport.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self._closed:
            self._on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            self._on_closed(self._error)
