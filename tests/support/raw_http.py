"""Requests as bytes, for what no client library would send."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any


def raw(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    host: str | None = "localhost",
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case), body; 0: no answer. Bytes go out as they are, other bodies as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"Connection": "close", "Content-Length": str(len(data))}
    if host is not None:
        fields["Host"] = host
    if body is not None:
        fields["Content-Type"] = "application/json"
    lines = [f"{name}: {value}" for name, value in (fields | dict(headers or {})).items() if value]
    request = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + data
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(request)
        return parsed(received(connection))


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer that is whole."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head:
        return 0, {}, b""
    first, *lines = head.decode("latin-1").split("\r\n")
    named = (line.partition(":") for line in lines)
    return int(first.split(" ")[1]), {name.lower(): value.strip() for name, _, value in named}, body
