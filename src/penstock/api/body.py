"""Request bodies: reading them within limits, decoding them, and naming the field that is at fault.

Refuses: other media types than JSON, compressed bodies, bodies over the cap, bodies that don't arrive in
time, JSON nested deeper than MAX_DEPTH. Whatever bytes come in, the outcome is a request struct or a
PenstockError.
"""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec

from penstock.api.admission import Lease
from penstock.api.exchange import Exchange
from penstock.api.schema import Asked
from penstock.errors import Kind, PenstockError

MAX_BODY = 32_000_000
MAX_DEPTH = 64
ON_POOL = 256_000
"""Bodies longer than this many bytes are decoded off the event loop."""
PREPARING = 8
"""Bytes held per byte of body while it is decoded, rendered and tokenised (measured about 6 for chat)."""
PER_SIGN = {b"{": 512, b"[": 512, b",": 64}
"""And per sign that may begin a value: a body of small messages becomes 27 times its size (measured)."""
NAME_WITHIN = 1_000_000
"""How far into a malformed body the field at fault is looked for, in bytes."""

Request = TypeVar("Request", bound=Asked)

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{},:]', re.DOTALL)
_LONE_SURROGATE = re.compile(rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|[c-fC-F][0-9a-fA-F]{2})")
_MSGSPEC = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"required field `(?P<name>[^`]+)`")


async def read_request(
    exchange: Exchange, lease: Lease, kind: type[Request], pool: Executor, seconds: float
) -> tuple[dict[str, Any], Request]:
    """The body as plain objects and as a `kind`. Raises PenstockError, or ClientGone if the client left."""
    media = exchange.header(b"content-type").split(b";")[0].strip().lower()
    if media != b"application/json":
        raise PenstockError(Kind.MEDIA_TYPE, "Send the request with 'Content-Type: application/json'.")
    if exchange.header(b"content-encoding").strip().lower() not in (b"", b"identity"):
        raise PenstockError(Kind.MEDIA_TYPE, "The body is read as it is: send it without 'Content-Encoding'.")
    try:
        async with asyncio.timeout(seconds):
            body = await _read(exchange, lease)
    except TimeoutError:
        raise PenstockError(Kind.TIMEOUT, f"The request's body did not arrive in {seconds:g} s.") from None
    lease.resize(len(body) * PREPARING + sum(body.count(sign) * size for sign, size in PER_SIGN.items()))
    if len(body) <= ON_POOL:
        return decode(body, kind)
    return await asyncio.get_running_loop().run_in_executor(pool, decode, body, kind)


async def _read(exchange: Exchange, lease: Lease) -> bytes:
    length = exchange.header(b"content-length")
    too_large = PenstockError(Kind.TOO_LARGE, f"The request's body is larger than {MAX_BODY:,} bytes.")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        part, more = await exchange.receive_body()
        size += len(part)
        if size > MAX_BODY:
            raise too_large
        lease.resize(size * PREPARING)
        parts.append(part)
        if not more:
            return parts[0] if len(parts) == 1 else b"".join(parts)


def decode(body: bytes, kind: type[Request]) -> tuple[dict[str, Any], Request]:
    """Pure: bytes to (plain objects with unknown fields kept, checked struct)."""
    body = body.removeprefix("\ufeff".encode())  # a byte order mark
    try:
        raw = msgspec.json.decode(body)
        request = msgspec.convert(kind.readable(raw), kind)
        if not _shallow(raw, MAX_DEPTH):
            raise RecursionError
    except RecursionError:
        raise PenstockError(
            Kind.INVALID_FIELD, f"The body is nested deeper than {MAX_DEPTH} levels."
        ) from None
    except msgspec.ValidationError as error:
        raise misfit(_rephrased(body, kind, error)) from None
    except UnicodeDecodeError as error:
        raise _malformed(body, _first_bad_byte(body), f"not valid UTF-8 ({error.reason})") from None
    except msgspec.DecodeError as error:
        raise _undecodable(body, str(error)) from None
    return raw, request


def _rephrased(body: bytes, kind: Any, error: msgspec.ValidationError) -> str:
    """A number out of range fails while decoding without types, where msgspec can't name the field."""
    if "`$[...]" not in str(error):
        return str(error)
    try:
        msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as named:
        return str(named)
    except (msgspec.DecodeError, RecursionError):
        pass
    return str(error)


def misfit(text: str) -> PenstockError:
    """What msgspec says of a value that does not fit, with the field's path."""
    match = _MSGSPEC.match(text)
    assert match is not None
    what, path = match["what"], (match["path"] or "").lstrip(".").replace("[...]", "")
    missing = _MISSING.search(what)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
        what = "This field is required"
    message = f"{path or 'The body'}: {what.replace('`', '')}."
    return PenstockError(Kind.INVALID_FIELD, message, param=path or None)


def _undecodable(body: bytes, reason: str) -> PenstockError:
    surrogate = _LONE_SURROGATE.search(body)
    byte = re.search(r"\(byte (\d+)\)", reason)
    if surrogate and ("surrogate" in reason or "truncated" in reason):
        return _malformed(body, surrogate.start(), "a lone surrogate is not text")
    if byte:
        return _malformed(body, int(byte[1]), reason.removeprefix("JSON is malformed: "))
    return _malformed(body, len(body), "it ends too early")


def _malformed(body: bytes, offset: int, reason: str) -> PenstockError:
    path = path_at(body, offset) or None
    where = f", in {path}" if path else ""
    return PenstockError(Kind.INVALID_JSON, f"The body is not valid JSON{where}: {reason}.", param=path)


def _first_bad_byte(body: bytes) -> int:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(body)


def path_at(body: bytes, offset: int) -> str:
    """The path of the JSON value that stands at a byte offset, as far as the text before it tells."""
    if offset > NAME_WITHIN:
        return ""
    path: list[bytes | int | None] = []  # one entry per open container: a key, an index, or a key yet to come
    last = b""
    for match in _TOKEN.finditer(body, 0, offset):
        token = match[0]
        if token in b"{[":
            path.append(None if token == b"{" else 0)
        elif token in b"}]":
            if path:
                path.pop()
        elif token == b":" and path:
            path[-1] = last
        elif token == b"," and path:
            here = path[-1]
            path[-1] = here + 1 if isinstance(here, int) else None
        last = token.strip(b'"')
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step is not None:
            text += ("." if text else "") + step[:64].decode(errors="replace")
    return text


def _shallow(value: dict[str, Any] | list[Any], left: int) -> bool:
    children = value.values() if isinstance(value, dict) else value
    return left > 0 and all(_shallow(one, left - 1) for one in children if isinstance(one, (dict, list)))
