"""The engine's end of the socketpair, and the frame splitter that both ends use.

A reader thread turns bytes into messages on a queue, so that a cancel is seen between two steps and an idle
loop sleeps until there is work. `send` never waits for the front: what the socket does not take at once is
drained by a writer thread, and `backlog` tells the loop when to stop launching steps. When the front is gone
the loop is told, and a loop that is stuck does not keep the process: no engine outlives its front.
This module imports neither asyncio nor MLX.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import resource
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence

from penstock import wire
from penstock.page import Page

CHUNK = 1 << 18
EXIT_GRACE = 5.0
_LENGTH = struct.Struct("<I")


class FrontGone(Exception):
    """The front closed its end; every message before that has been received."""


class Frames:
    """Splits a byte stream into frame bodies, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._needed = wire.FRAME_HEADER

    def feed(self, chunk: bytes | memoryview) -> list[bytes]:
        """The bodies that `chunk` completes. Raises ValueError for a length beyond wire.MAX_FRAME."""
        held = self._held
        held += chunk
        if len(held) < self._needed:
            return []
        bodies: list[bytes] = []
        at, size = 0, len(held)
        self._needed = wire.FRAME_HEADER
        while size - at >= wire.FRAME_HEADER:
            (length,) = _LENGTH.unpack_from(held, at)
            if length > wire.MAX_FRAME:
                raise ValueError(f"frame of {length} bytes")
            end = at + wire.FRAME_HEADER + length
            if end > size:
                self._needed = end - at
                break
            bodies.append(bytes(held[at + wire.FRAME_HEADER : end]))
            at = end
        del held[:at]
        return bodies


class EngineChannel:
    """Messages to and from the front, for one loop thread."""

    def __init__(self, sock: socket.socket, *, exit_grace: float | None = EXIT_GRACE) -> None:
        """`exit_grace`: seconds that a loop has to exit once the front is gone; None: no limit, for tests."""
        sock.setblocking(False)  # macOS knows no MSG_DONTWAIT for what is sent
        self._sock = sock
        self._exit_grace = exit_grace
        self._inbox: queue.SimpleQueue[wire.ToEngine | None] = queue.SimpleQueue()
        self._front_gone = False
        self._outgoing = bytearray()
        self._sending = 0
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        threading.Thread(target=self._read, name="channel-reader", daemon=True).start()
        threading.Thread(target=self._write, name="channel-writer", daemon=True).start()

    @property
    def backlog(self) -> int:
        """Bytes sent that the front has not taken yet (the socket's own buffer not counted)."""
        return len(self._outgoing) + self._sending

    def receive(self, timeout: float | None = 0.0) -> list[wire.ToEngine]:
        """All messages at hand, waiting at most `timeout` seconds (None: for ever) for the first one.

        Raises FrontGone once the front has closed and everything before was returned.
        """
        if self._front_gone:
            raise FrontGone
        messages: list[wire.ToEngine] = []
        with contextlib.suppress(queue.Empty):
            message = self._inbox.get(timeout=timeout) if timeout != 0 else self._inbox.get_nowait()
            while message is not None:
                messages.append(message)
                message = self._inbox.get_nowait()
            self._front_gone = True
        if self._front_gone and not messages:
            raise FrontGone
        return messages

    def send(self, message: wire.ToFront) -> None:
        """Never waits. What the front can no longer take, because it is gone, is dropped."""
        frame = wire.encode(message)
        with self._lock:
            taken = 0
            if not self._outgoing and not self._sending:
                try:
                    taken = self._sock.send(frame)
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:
                    return
            if taken < len(frame):
                self._outgoing += frame[taken:]
                self._more.notify()

    def flush(self, timeout: float) -> None:
        """Waits until the front has taken everything, at most `timeout` seconds: before an exit."""
        deadline = time.monotonic() + timeout
        while self.backlog and time.monotonic() < deadline:
            time.sleep(0.002)

    def _read(self) -> None:
        frames = Frames()
        # Read into one buffer: a fresh one of this size costs more than all the rest of a small read.
        buffer = memoryview(bytearray(CHUNK))
        try:
            while _wait(self._sock, select.POLLIN) and (size := self._sock.recv_into(buffer)):
                for body in frames.feed(buffer[:size]):
                    self._inbox.put(wire.decode_to_engine(body))
        except OSError:
            pass
        except Exception as error:
            print(f"ERROR:the front sent what is no message: {error}", file=sys.stderr, flush=True)
        self._inbox.put(None)
        # A loop stuck in a native call can't see the message; the process must go all the same.
        if self._exit_grace is not None:
            time.sleep(self._exit_grace)
            os._exit(1)

    def _write(self) -> None:
        while True:
            with self._lock:
                while not self._outgoing:
                    self._more.wait()
                data, self._outgoing = self._outgoing, bytearray()
                self._sending = len(data)
            with contextlib.suppress(OSError):
                while data and _wait(self._sock, select.POLLOUT):
                    del data[: self._sock.send(data)]
            with self._lock:
                self._sending = 0


def _wait(sock: socket.socket, event: int) -> bool:
    """Until the socket is ready for it, or broken."""
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll())


def adopt(arguments: Sequence[str], exit_grace: float = EXIT_GRACE) -> tuple[EngineChannel, Page]:
    """The engine's first act: takes over the descriptors its command line names, and forbids core files."""
    parser = argparse.ArgumentParser(prog="penstock.engine")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--page-fd", type=int, required=True)
    names = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for fd in (names.socket_fd, names.page_fd):
        # A child of the engine that kept the socket would hide the engine's death.
        os.set_inheritable(fd, False)
    page = Page.attach(names.page_fd)
    page.close_fd()
    return EngineChannel(socket.socket(fileno=names.socket_fd), exit_grace=exit_grace), page
