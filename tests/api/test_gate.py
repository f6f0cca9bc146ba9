"""Hosts, origins, keys: who may talk to the server."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.support.fake_backend import Server, serving

from penstock.api.exchange import Exchange
from penstock.api.security import Gate, host_name
from penstock.config import Options
from penstock.errors import PenstockError


def verdict(
    gate: Gate, *, server: str = "127.0.0.1", path: str = "/x", method: str = "GET", **headers: str
) -> str:
    """'ok', or the label of the refusal."""
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": fields, "server": (server, 1)}
    try:
        gate.admit(Exchange(scope, None, None))  # type: ignore[arg-type]
    except PenstockError as error:
        return error.kind.label
    return "ok"


@pytest.mark.parametrize(
    ("host", "outcome"),
    [
        ("localhost", "ok"),
        ("LOCALHOST:8080", "ok"),
        ("localhost.:8080", "ok"),
        ("127.0.0.1:1", "ok"),
        ("[::1]:8080", "ok"),
        ("box.lan", "ok"),
        ("box.lan:8080", "ok"),
        ("10.0.0.5:8080", "ok"),
        ("evil.example", "forbidden_host"),
        ("localhost.evil.example", "forbidden_host"),
        ("evil.example:localhost", "forbidden_host"),
        ("127.0.0.1.evil.example", "forbidden_host"),
        ("10.0.0.6", "forbidden_host"),
        ("", "forbidden_host"),
    ],
)
def test_hosts(host: str, outcome: str) -> None:
    gate = Gate("0.0.0.0", ["box.lan"], [], [])
    assert verdict(gate, server="10.0.0.5", host=host) == outcome


def test_a_missing_host_and_the_wildcard_name_are_refused() -> None:
    gate = Gate("0.0.0.0", [], [], [])
    assert verdict(gate) == "forbidden_host"
    assert verdict(gate, host="0.0.0.0:8080") == "forbidden_host"
    assert verdict(Gate("box.lan", [], [], []), host="box.lan:8080") == "ok"


def test_host_names() -> None:
    assert [host_name(text) for text in ("[FE80::1]:80", "a:1", "a.", "")] == ["fe80::1", "a", "a", ""]


@pytest.mark.parametrize(
    ("origin", "outcome"),
    [
        ("https://evil.example", "forbidden_origin"),
        ("null", "forbidden_origin"),
        ("http://localhost:3000", "forbidden_origin"),
        ("http://localhost:8080", "ok"),
        ("http://Localhost:8080", "ok"),
        ("https://app.example", "ok"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_origins(origin: str, outcome: str, method: str) -> None:
    gate = Gate("127.0.0.1", [], ["https://app.example/"], [])
    assert verdict(gate, method=method, host="localhost:8080", origin=origin) == outcome


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ({}, "unauthorized"),
        ({"authorization": "Bearer secret"}, "ok"),
        ({"authorization": "bearer  secret "}, "ok"),
        ({"x_api_key": "other"}, "ok"),
        ({"authorization": "Bearer secre"}, "unauthorized"),
        ({"authorization": "Bearer "}, "unauthorized"),
        ({"authorization": "Basic secret"}, "unauthorized"),
        ({"x_api_key": "wrong", "authorization": "Bearer wrong"}, "unauthorized"),
    ],
)
def test_keys(headers: dict[str, str], outcome: str) -> None:
    gate = Gate("127.0.0.1", [], [], ["secret", "other"])
    assert verdict(gate, host="localhost", **headers) == outcome
    assert verdict(gate, host="localhost", path="/health", **headers) == "ok"
    assert verdict(gate, host="localhost", method="OPTIONS", **headers) == "ok"


def call(server: Server, method: str, path: str, **headers: str) -> httpx.Response:
    with server.client() as client:
        return client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_cors_only_for_listed_origins() -> None:
    options = Options(port=0, allowed_origins=("https://app.example",), api_key=("k",))
    asked: dict[str, Any] = {
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type",
    }
    with serving(options=options) as server:
        good = call(server, "OPTIONS", "/v1/chat/completions", origin="https://app.example", **asked)
        evil = call(server, "OPTIONS", "/v1/chat/completions", origin="https://evil.example", **asked)
        answer = call(server, "GET", "/v1/models", origin="https://app.example", x_api_key="k")
        refused = call(server, "GET", "/v1/models", origin="https://app.example")
        plain = call(server, "GET", "/v1/models", x_api_key="k")
    assert good.status_code == 204
    assert good.headers["access-control-allow-origin"] == "https://app.example"
    assert good.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in good.headers["access-control-allow-methods"]
    assert evil.status_code == 403
    assert "access-control-allow-origin" not in evil.headers
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in plain.headers


def test_any_origin_where_it_is_asked_for() -> None:
    with serving(options=Options(port=0, allowed_origins=("*",))) as server:
        answer = call(server, "GET", "/health", origin="null")
    assert answer.headers["access-control-allow-origin"] == "*"


def test_one_shape_for_every_refusal() -> None:
    with serving() as server:
        answers = [
            call(server, "GET", "/nope"),
            call(server, "DELETE", "/v1/models"),
            call(server, "GET", "/v1/chat/completions"),
            call(server, "GET", "/v1/models/nope/nope"),
            call(server, "GET", "/", host="evil.example"),
        ]
    assert [answer.status_code for answer in answers] == [404, 405, 405, 404, 403]
    for answer in answers:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answers[1].headers["allow"] == "GET, HEAD, OPTIONS"
