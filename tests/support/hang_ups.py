"""Clients that hang up at a chosen moment of a request, by close or by reset, over plain sockets."""

from __future__ import annotations

import ctypes
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

SO_ATTACH_FILTER = 26
STAGES = ("tokenise", "queued", "prefill", "tokens", "last", "plain")


def text(length: int, seed: int) -> str:
    """Different from the first word on per seed."""
    return "".join(random.Random(seed).choices("abcdefgh ijklmnop", k=length))


def post(port: int, body: dict[str, Any]) -> socket.socket:
    """A chat request on a connection of its own."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def until(connection: socket.socket, mark: bytes, times: int = 1) -> bytes:
    """What came up to the mark."""
    received = b""
    while received.count(mark) < times and (part := connection.recv(65536)):
        received += part
    return received


def vanish(connection: socket.socket) -> None:
    """The client's machine is gone: nothing that comes is answered any more, or even acknowledged. Linux.

    A filter on the socket drops all packets. Keep the connection: its end would be told to the server.
    """
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    connection.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(drop_all))
    )


def leave(connection: socket.socket, reset: bool) -> None:
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def hang_up(port: int, stage: str, seed: int, long: int = 1500) -> str:
    """One client that leaves at `stage`. Returns the text of its prompt."""
    content = text(long if stage in ("prefill", "queued", "tokenise") else 30, seed)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 3 if stage == "last" else 400,
        "stream": stage != "plain",
        "return_progress": True,
    }
    connection = post(port, body)
    mark: Callable[[], object] = lambda: None  # noqa: E731
    if stage == "queued":
        mark = lambda: until(connection, b'"role":"assistant"')  # noqa: E731
    elif stage == "prefill":
        mark = lambda: until(connection, b"prompt_progress")  # noqa: E731
    elif stage == "tokens":
        mark = lambda: until(connection, b'"content":"', 3 + seed % 5)  # noqa: E731
    elif stage == "last":
        mark = lambda: until(connection, b'"finish_reason":"')  # noqa: E731
    mark()
    leave(connection, reset=seed % 2 == 0)
    return content


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
