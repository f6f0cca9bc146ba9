"""The ASGI application: every request passes the gate, finds its handler, and gets an answer in one shape.

Plain ASGI around Starlette's router, so that a chunk of a stream passes through no middleware. The one place
where exceptions become responses: a PenstockError by the table, anything else as INTERNAL with a traceback in
the log and none for the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock import log
from penstock.api import chat, completions, dashboard, messages, metrics, models, responses, status, tokens
from penstock.api.exchange import ClientGone, Exchange
from penstock.api.security import Gate
from penstock.api.service import Service
from penstock.api.sse import known
from penstock.config import Options
from penstock.dashboard import FILES
from penstock.errors import Kind, PenstockError

Handler = Callable[[Service, Exchange], Awaitable[None]]
MAX_HEADERS = 32_768
QUIET = ("/health", "/metrics", "/v1/status", "/v1/status/history", "/v1/models", "/models", *FILES)
"""Probes, logged at DEBUG only."""
ENDPOINTS: dict[str, tuple[str, Handler]] = {
    "/v1/chat/completions": ("POST", chat.create),
    "/chat/completions": ("POST", chat.create),
    "/v1/completions": ("POST", completions.create),
    "/v1/messages": ("POST", messages.create),
    "/v1/messages/count_tokens": ("POST", messages.count),
    "/v1/responses": ("POST", responses.create),
    "/tokenize": ("POST", tokens.tokenize),
    "/detokenize": ("POST", tokens.detokenize),
    "/v1/models": ("GET", models.listed),
    "/models": ("GET", models.listed),
    "/v1/models/{id:path}": ("GET", models.one),
    "/v1/status": ("GET", status.shown),
    "/v1/status/history": ("GET", status.history),
    "/v1/requests/{id}/cancel": ("POST", status.cancel),
    "/v1/cache/clear": ("POST", status.clear_cache),
    "/metrics": ("GET", metrics.scraped),
    "/health": ("GET", models.health),
    "/openapi.json": ("GET", models.described),
    **dict.fromkeys(FILES, ("GET", dashboard.file)),
    "/": ("GET", dashboard.root),
}


class _Endpoint:
    """The handler of one path, and its method."""

    def __init__(self, service: Service, method: str, handler: Handler) -> None:
        self._service, self._handler = service, handler
        self._methods = ("GET", "HEAD") if method == "GET" else (method,)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["penstock"]
        exchange.scope = scope
        if exchange.method not in self._methods:
            allowed = ", ".join((*self._methods, "OPTIONS"))
            exchange.extra.append((b"allow", allowed.encode()))
            raise PenstockError(Kind.METHOD, f"{exchange.method[:20]} is not allowed here; use {allowed}.")
        await self._handler(self._service, exchange)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise PenstockError(Kind.NOT_FOUND, "There is nothing at this path; /openapi.json lists the paths.")


def create_app(service: Service, options: Options) -> ASGIApp:
    """The application. `service` may still lack its text parts; requests wait for them."""
    gate = Gate(options.host, options.allowed_hosts, options.allowed_origins, options.api_key)
    routes = [Route(path, _Endpoint(service, *served)) for path, served in ENDPOINTS.items()]
    router = Router(routes, redirect_slashes=False, default=_not_found)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _serve(service, Exchange(scope, receive, send), gate, router)

    return app


async def _serve(service: Service, exchange: Exchange, gate: Gate, router: ASGIApp) -> None:
    try:
        if sum(len(name) + len(value) for name, value in exchange.scope["headers"]) > MAX_HEADERS:
            raise PenstockError(Kind.HEADERS_TOO_LARGE, f"Headers are limited to {MAX_HEADERS:,} bytes.")
        gate.admit(exchange)
        if exchange.method == "OPTIONS":
            await exchange.respond(204, b"", headers=gate.preflight_headers(exchange))
            return
        await router({**exchange.scope, "penstock": exchange}, exchange.receive, exchange.send)
        if exchange.path in QUIET:
            log.probe(exchange.method, exchange.path, exchange.status)
    except ClientGone:
        pass  # the handler's line in the log has said so
    except Exception as error:
        failure = known(error, exchange.id)
        if exchange.started:
            return  # headers are out: the connection's end is all that can be told
        service.failed(failure)
        if failure.kind is not Kind.INTERNAL:
            where = f" ({failure.param})" if failure.param else ""
            log.repeated(failure.kind.label, f"refused a request: {failure.kind.label}{where}")
        await exchange.respond_error(failure)
    except asyncio.CancelledError:  # the server ends, and has waited long enough
        if exchange.started:
            exchange.cut()
            await asyncio.sleep(0)
        else:
            await exchange.respond_error(PenstockError(Kind.SHUTTING_DOWN, "The server is shutting down."))
