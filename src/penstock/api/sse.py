"""Answers a generation over HTTP: as an event stream, or whole.

A `Renderer` makes the bytes; here are the order of events, the silence timer and the errors after the
headers. Invariant: a stream ends with its API's last word, with an error event, or with its client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from penstock import log
from penstock.api import params
from penstock.api.admission import UNSENT, Lease
from penstock.api.body import Request, read_request
from penstock.api.exchange import Exchange
from penstock.api.generation import Generation, Piece, Plan
from penstock.api.renderer import Renderer
from penstock.api.service import Service
from penstock.errors import Kind, PenstockError
from penstock.supervisor.ticket import Progress


class Silence:
    """Sends a keepalive when nothing was sent for a while; gives up on a client that doesn't read.

    None while the engine has stalled: keepalives would hide that nothing moves.

    One timer per stream, looked at when it is due, so that a token costs it two attribute writes.
    """

    def __init__(self, service: Service, exchange: Exchange, renderer: Renderer) -> None:
        self._service, self._exchange, self._renderer = service, exchange, renderer
        self._interval = service.timing.keepalive
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._sending = False
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(self._interval, self._due)

    async def send(self, data: bytes, more: bool = True) -> None:
        """A part of the body, or the last. Waits while the client doesn't read."""
        self._sending = True
        self._last = self._loop.time()
        await self._exchange.send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending = False

    async def end(self, data: bytes) -> None:
        """The last part of the body."""
        self._exchange.complete = True
        await self.send(data, more=False)

    def _due(self) -> None:
        now = self._loop.time()
        quiet = now - self._last
        if self._sending and quiet >= self._service.timing.stalled_reader:
            self._exchange.cut()
        elif not self._sending and quiet >= self._interval and self._service.backend.state != "stalled":
            self._task = self._loop.create_task(self.send(self._renderer.keepalive()))
            quiet = 0.0
        self._timer = self._loop.call_later(max(self._interval - quiet, self._interval / 4), self._due)

    def stop(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


async def stream(
    service: Service, exchange: Exchange, run: Generation, renderer: Renderer
) -> PenstockError | None:
    """Headers and opening at once, then a chunk per event. Returns the failure told in an error event."""
    await exchange.start_stream()
    silence = Silence(service, exchange, renderer)
    try:
        if opening := renderer.opening():
            await silence.send(opening)
        while (event := await run.next()) is not None:
            if isinstance(event, Piece):
                data = renderer.piece(event)
            else:
                data = _progress(exchange, run, renderer, event)
            if data:
                await silence.send(data)
        await silence.end(renderer.ending(run.usage()))
    except Exception as error:
        failure = known(error, exchange.id)
        await silence.end(renderer.failure(failure))
        return failure
    finally:
        silence.stop()
    return None


async def plain(exchange: Exchange, run: Generation, renderer: Renderer, lease: Lease) -> None:
    """The whole answer, when it is there. Raises PenstockError before anything was sent."""
    text, base = 0, lease.bytes
    while (event := await run.next()) is not None:
        if isinstance(event, Piece):
            text += renderer.collect(event)
            if base + text - lease.bytes > 65_536:
                lease.resize(base + text, refuse=False)
        else:
            _progress(exchange, run, renderer, event)
    await exchange.respond_json(200, renderer.whole(run.usage()))


def _progress(exchange: Exchange, run: Generation, renderer: Renderer, event: Progress) -> bytes:
    log.progress(exchange.name, event.done, event.total)
    if not run.plan.return_progress:
        return b""
    stats = run.tickets[0].stats
    seconds = time.monotonic() - (stats.first_prefill or stats.submitted)
    return renderer.progress(event, run.cached(), seconds * 1000)


def known(error: Exception, request: str) -> PenstockError:
    """What the client is told about an exception; the log gets the traceback of those that are bugs."""
    if isinstance(error, PenstockError):
        return error
    log.bug(f"request {request}", error)
    return PenstockError(Kind.INTERNAL, f"Internal error; the server's log tells more of request {request}.")


async def respond(
    service: Service,
    exchange: Exchange,
    kind: type[Request],
    prepare: Callable[[Service, dict[str, Any], Request], Awaitable[Plan]],
    make_renderer: Callable[[str, str, Plan], Renderer],
) -> None:
    """From a request's body, a `kind`, to its answer's end. Raises PenstockError before anything was sent."""
    with service.admission.lease() as lease:
        raw, request = await read_request(exchange, lease, kind, service.pool, service.timing.body)
        with exchange.ends_with_client():
            params.check_model(request.model, service.served_names, service.strict_model_names)
            plan = await prepare(service, raw, request)
            plan = replace(plan, jobs=[replace(job, namespace=exchange.namespace) for job in plan.jobs])
            del raw, request
            lease.resize(sum(4 * len(job.prompt) + UNSENT * job.n for job in plan.jobs) + plan.retained)
            renderer = make_renderer(exchange.id, service.model_name, plan)
            await answer(service, exchange, Generation(service.backend, plan), renderer, lease)


async def answer(
    service: Service, exchange: Exchange, run: Generation, renderer: Renderer, lease: Lease
) -> None:
    """Run a generation to its end and answer it; tickets are closed and the log told, whatever happens."""
    service.requests[exchange.id] = exchange, run
    try:
        run.open()
        failure = None
        if run.plan.stream:
            failure = await stream(service, exchange, run, renderer)
        else:
            await plain(exchange, run, renderer, lease)
        if failure is None:
            log.request_done(run.record(exchange.name))
        else:
            service.failed(failure)
            log.request_failed(exchange.name, failure.kind.label, failure.message)
    except PenstockError as error:
        log.request_failed(exchange.name, error.kind.label, error.message)
        raise
    except asyncio.CancelledError:
        log.request_cancelled(exchange.name, sum(choice.generated for choice in run.choices))
        raise
    finally:
        del service.requests[exchange.id]
        run.close()
