"""Who may talk to the server: host names, web origins and keys. Pure; the app acts on what it says.

Model: loopback by default, and every page in the user's browser is an attacker. A page can reach us by DNS
rebinding (a foreign Host), or across origins (an Origin that isn't ours). Refused on every method and path.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable

from penstock.api.exchange import Exchange, Header
from penstock.dashboard import FILES
from penstock.errors import Kind, PenstockError

KEYED_CACHE = b"penstock cache"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::", "")
OPEN_PATHS = ("/health", *FILES)
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}")


def host_name(authority: str) -> str:
    """'[::1]:8080' -> '::1'; 'LocalHost:8080' -> 'localhost'."""
    text = authority.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")


def cache_of(key: str) -> str:
    """The name of a key's prompt cache: the key can't be had from it, nor from what else is kept of it."""
    return hashlib.blake2b(key.encode(), digest_size=16, person=KEYED_CACHE).hexdigest()


class Gate:
    """The rules made from the options, applied to one exchange at a time."""

    def __init__(
        self, host: str, allowed_hosts: Iterable[str], allowed_origins: Iterable[str], keys: Iterable[str]
    ) -> None:
        own = () if host in WILDCARDS else (host.lower(),)
        named = (
            name if name.count(":") > 1 and name[0] != "[" else host_name(name) for name in allowed_hosts
        )
        self._hosts = frozenset((*LOOPBACK, *own, *named))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._keys = [(hashlib.sha256(key.encode()).digest(), cache_of(key)) for key in keys]

    def admit(self, exchange: Exchange) -> None:
        """Adds the CORS headers the exchange is entitled to, and names its key's cache.

        Raises the FORBIDDEN kinds or UNAUTHORIZED.
        """
        hosts = [value.decode("latin-1") for value in exchange.header_values(b"host")]
        local = (exchange.scope.get("server") or ("",))[0].lower()
        for host in hosts or [""]:
            # The address the connection came in at is no name, so it can't have been rebound.
            if host_name(host) not in self._hosts and host_name(host) != local:
                raise PenstockError(
                    Kind.FORBIDDEN_HOST,
                    "This Host is not allowed; the server's --allowed-hosts lists others.",
                )
        self._check_origin(exchange, hosts)
        if self._keys and exchange.path not in OPEN_PATHS and exchange.method != "OPTIONS":
            self._check_key(exchange)

    def _check_origin(self, exchange: Exchange, hosts: list[str]) -> None:
        for value in exchange.header_values(b"origin"):
            origin = value.decode("latin-1").lower().rstrip("/")
            if "*" in self._origins or origin in self._origins:
                allowed = b"*" if "*" in self._origins else value
                exchange.extra += [(b"access-control-allow-origin", allowed), (b"vary", b"origin")]
            elif origin not in (
                f"{scheme}://{host.lower()}" for host in hosts for scheme in ("http", "https")
            ):
                raise PenstockError(
                    Kind.FORBIDDEN_ORIGIN,
                    "This web origin is not allowed; --allowed-origins lists those that are.",
                )

    def _check_key(self, exchange: Exchange) -> None:
        scheme, _, token = exchange.header(b"authorization").strip().partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else exchange.header(b"x-api-key").strip()
        digest = hashlib.sha256(given).digest()
        known = [cache for key, cache in self._keys if hmac.compare_digest(digest, key)]
        if not given or not known:
            raise PenstockError(Kind.UNAUTHORIZED, "A valid API key is needed: 'Authorization: Bearer KEY'.")
        exchange.namespace = known[0]

    @staticmethod
    def preflight_headers(exchange: Exchange) -> list[Header]:
        """The answer to a preflight whose origin was admitted."""
        asked = exchange.header(b"access-control-request-headers")
        headers = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, OPTIONS"),
            (b"access-control-max-age", b"600"),
        ]
        if _HEADER_NAMES.fullmatch(asked):
            headers.append((b"access-control-allow-headers", asked))
        if exchange.header(b"access-control-request-private-network") == b"true":
            headers.append((b"access-control-allow-private-network", b"true"))
        return headers
