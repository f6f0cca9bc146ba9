"""Answers a generation over HTTP: as an event stream, or whole.

A `Renderer` (chat's, completions') makes the bytes; here are the order of events, the silence timer and the
errors after the headers. Invariant: a stream ends with [DONE], with an error event, or with its client.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import msgspec

from penstock import log
from penstock.api.admission import Lease
from penstock.api.exchange import Exchange
from penstock.api.generation import Generation, Piece
from penstock.api.service import Service
from penstock.errors import Kind, PenstockError
from penstock.supervisor.ticket import Progress

DONE = b"data: [DONE]\n\n"


class Renderer(Protocol):
    """How an API words a generation. The bytes of stream methods are whole server-sent events."""

    keepalive: bytes

    def opening(self, choices: int) -> bytes: ...
    def piece(self, piece: Piece) -> bytes: ...
    def progress(self, progress: Progress, cached: int, milliseconds: float) -> bytes: ...
    def usage(self, usage: dict[str, Any]) -> bytes: ...
    def collect(self, piece: Piece) -> int: ...
    def whole(self, usage: dict[str, Any]) -> dict[str, Any]: ...


class Silence:
    """Sends a keepalive when nothing was sent for a while; gives up on a client that doesn't read.

    None while the engine has stalled: keepalives would hide that nothing moves.

    One timer per stream, looked at when it is due, so that a token costs it two attribute writes.
    """

    def __init__(self, service: Service, exchange: Exchange, keepalive: bytes) -> None:
        self._exchange = exchange
        self._send = exchange.send
        self._keepalive = keepalive
        self._backend = service.backend
        self._interval = service.timing.keepalive
        self._patience = service.timing.stalled_reader
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._sending = False
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(self._interval, self._due)

    async def send(self, data: bytes, more: bool = True) -> None:
        """A part of the body, or the last. Waits while the client doesn't read."""
        self._sending = True
        self._last = self._loop.time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending = False

    async def end(self, data: bytes) -> None:
        """The last part of the body."""
        self._exchange.complete = True
        await self.send(data, more=False)

    def _due(self) -> None:
        now = self._loop.time()
        quiet = now - self._last
        if self._sending and quiet >= self._patience:
            self._exchange.cut()
        elif not self._sending and quiet >= self._interval and self._backend.state != "stalled":
            self._task = self._loop.create_task(self.send(self._keepalive))
            quiet = 0.0
        self._timer = self._loop.call_later(max(self._interval - quiet, self._interval / 4), self._due)

    def stop(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


async def stream(service: Service, exchange: Exchange, run: Generation, renderer: Renderer) -> None:
    """Headers and opening at once, then a chunk per event. Raises Reported after its error event."""
    await exchange.start_stream()
    silence = Silence(service, exchange, renderer.keepalive)
    try:
        opening = renderer.opening(len(run.choices))
        if opening:
            await silence.send(opening)
        while (event := await run.next()) is not None:
            if type(event) is Piece:
                data = renderer.piece(event)
            else:
                data = _progress(exchange, run, renderer, event)  # type: ignore[arg-type]
            if data:
                await silence.send(data)
        last = renderer.usage(run.usage()) if run.plan.include_usage else b""
        await silence.end(last + DONE)
    except Exception as error:
        failure = known(error, exchange.id)
        await silence.end(b"data: " + msgspec.json.encode(failure.openai()) + b"\n\n")
        raise Reported(failure) from error
    finally:
        silence.stop()


class Reported(Exception):
    """A stream failed after its headers, and the client was told so in an event."""

    def __init__(self, error: PenstockError) -> None:
        super().__init__(error.message)
        self.error = error


async def plain(exchange: Exchange, run: Generation, renderer: Renderer, lease: Lease) -> None:
    """The whole answer, when it is there. Raises PenstockError before anything was sent."""
    text, base = 0, lease.bytes
    while (event := await run.next()) is not None:
        if type(event) is Piece:
            text += renderer.collect(event)
            if base + text - lease.bytes > 65_536:
                lease.resize(base + text, refuse=False)
        else:
            _progress(exchange, run, renderer, event)  # type: ignore[arg-type]
    await exchange.respond_json(200, renderer.whole(run.usage()))


def _progress(exchange: Exchange, run: Generation, renderer: Renderer, event: Progress) -> bytes:
    log.progress(exchange.name, event.done, event.total)
    if run.plan.return_progress:
        stats = run.tickets[0].stats
        seconds = time.monotonic() - (stats.first_prefill or stats.submitted)
        return renderer.progress(event, run.cached(), seconds * 1000)
    return b""


def known(error: Exception, request: str) -> PenstockError:
    """What the client is told about an exception; the log gets the traceback of those that are bugs."""
    if isinstance(error, PenstockError):
        return error
    log.bug(f"request {request}", error)
    return PenstockError(Kind.INTERNAL, f"Internal error; the server's log tells more of request {request}.")


async def answer(
    service: Service, exchange: Exchange, run: Generation, renderer: Renderer, lease: Lease
) -> None:
    """Run a generation to its end and answer it; tickets are closed and the log told, whatever happens."""
    try:
        run.open()
        if run.plan.stream:
            await stream(service, exchange, run, renderer)
        else:
            await plain(exchange, run, renderer, lease)
        log.request_done(run.record(exchange.name))
    except Reported as reported:
        log.request_failed(exchange.name, reported.error.kind.label, reported.error.message)
    except PenstockError as error:
        log.request_failed(exchange.name, error.kind.label, error.message)
        raise
    except asyncio.CancelledError:
        log.request_cancelled(exchange.name, sum(choice.generated for choice in run.choices))
        raise
    finally:
        run.close()
