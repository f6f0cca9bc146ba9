"""`/` and `/dashboard/...`: the page for browsers, the JSON that was always at `/` for everybody else.

The page may load, ask and send to nothing but this server, and runs no script that is not a file of it.
"""

from __future__ import annotations

from penstock.api import models
from penstock.api.exchange import Exchange, Header
from penstock.api.service import Service
from penstock.dashboard import FILES

_POLICY = (
    b"default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)
_HEADERS: list[Header] = [
    (b"cache-control", b"no-cache"),
    (b"content-security-policy", _POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


async def root(service: Service, exchange: Exchange) -> None:
    """GET and HEAD /: the page, or what this is in JSON."""
    exchange.extra.append((b"vary", b"accept"))
    if b"text/html" in exchange.header(b"accept").lower():
        await file(service, exchange)
    else:
        await models.root(service, exchange)


async def file(service: Service, exchange: Exchange) -> None:
    """GET and HEAD of a file, whose path is the exchange's; 304 where the browser has it."""
    known = FILES[exchange.path]
    headers = [*_HEADERS, (b"etag", known.etag)]
    if known.etag in exchange.header(b"if-none-match"):
        await exchange.respond(304, b"", headers=headers)
    else:
        await exchange.respond(200, known.body, media=known.media, headers=headers)
