"""What a page in the user's browser can try: another host's name, no preflight, its own origin.

The classes are those of the advisories in brackets.
"""

from __future__ import annotations

import re

import pytest
from tests.support.raw_http import raw
from tests.support.whole_server import WholeServer

from penstock.api.app import ENDPOINTS
from penstock.api.openapi import BODIES

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
PATHS = sorted({re.sub("{.*}", "x", path) for path in ENDPOINTS} | {"/nothing"})


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", None]
)
def test_dns_rebinding(target: WholeServer, host: str | None) -> None:
    """A page whose name was bound anew to this machine [CVE-2024-28224, CVE-2025-66414]."""
    for path in PATHS:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            status, headers, _ = raw(target.port, method, path, host=host)
            assert status in (400, 403), (method, path)
            assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "media",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=application/json",
     "text/plain; application/json", "application/jsonp"],
)  # fmt: skip
def test_posts_that_need_no_preflight(target: WholeServer, media: str) -> None:
    """A form or `fetch` with a simple media type goes out without a question to the server [GO-2025-4251].

    What takes no body is guarded by the origin alone, which browsers name with every post.
    """
    for path in BODIES:
        status, _, _ = raw(target.port, "POST", path, BODY, {"Content-Type": media})
        assert status == 415, path


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "file://"])
def test_other_origins(target: WholeServer, origin: str) -> None:
    """On every path and method, also where the answer could not be read [omlx#928]."""
    for path in PATHS:
        for method in ("GET", "POST", "OPTIONS"):
            status, headers, _ = raw(target.port, method, path, BODY, {"Origin": origin})
            assert status == 403, (method, path)
            assert "access-control-allow-origin" not in headers


def test_a_preflight_is_refused_unless_its_origin_is_listed(target: WholeServer) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Private-Network": "true"}  # fmt: skip
    status, headers, _ = raw(target.port, "OPTIONS", CHAT, headers=asked)
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_web_socket_is_no_way_round(target: WholeServer) -> None:
    """Browsers ask no permission for one."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Origin": "https://evil.example"}  # fmt: skip
    status, _, _ = raw(target.port, "GET", "/v1/models", headers=upgrade)
    assert status in (400, 403)
