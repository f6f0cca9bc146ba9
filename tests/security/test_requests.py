"""What a request's fields can try: numbers without bounds, templates, schemas and text that break things."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest
from tests.support.fake_backend import serving, text_parts
from tests.support.raw_http import parsed, raw, received
from tests.support.whole_server import WholeServer

from penstock.text import sandbox
from penstock.text.parts import TextParts
from penstock.text.template import RESERVED, ChatTemplate

CHAT = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"messages": [MESSAGE], "max_tokens": 1}


def status(target: WholeServer, body: Any, path: str = CHAT) -> int:
    return raw(target.port, "POST", path, body)[0]


@pytest.mark.parametrize("many", [17, 10**6, 2**31, 2**63, 10**30])
def test_answers_without_number(target: WholeServer, many: int) -> None:
    """[CVE-2026-34756]"""
    assert status(target, {**BODY, "n": many}) == 400
    assert status(target, {"prompt": "x", "n": many}, "/v1/completions") == 400
    assert status(target, {"prompt": "x", "best_of": many}, "/v1/completions") == 400
    assert status(target, {"prompt": ["x"] * 129, "max_tokens": 1}, "/v1/completions") == 400


@pytest.mark.parametrize(
    "field",
    ["max_tokens", "max_completion_tokens", "min_tokens", "n", "top_k", "top_logprobs",
     "repetition_context_size", "presence_context_size", "num_draft_tokens"],
)  # fmt: skip
@pytest.mark.parametrize("value", [-2, -(2**31), -(2**63), -(10**30), 1.5, "1", True])
def test_numbers_out_of_range(target: WholeServer, field: str, value: Any) -> None:
    """[CVE-2026-21869]"""
    assert status(target, {**BODY, field: value}) == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["x"] * 17},
        {"stop": "x" * 4097},
        {"logit_bias": {str(n): 1 for n in range(1025)}},
        {"top_logprobs": 21, "logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 1025},
        {"tools": [{"type": "function", "function": {"name": "f" * 257}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 4_000_001}}]},
        {"x": json.loads("[" * 65 + "]" * 65)},
    ],
    ids=["stops", "a stop", "biases", "logprobs", "tools", "a tool's name", "tools together", "depth"],
)
def test_fields_without_bounds(target: WholeServer, fields: dict[str, Any]) -> None:
    """[CVE-2026-9540, CVE-2025-48887]"""
    assert status(target, {**BODY, **fields}) == 400


def test_a_template_in_a_request_is_text(target: WholeServer) -> None:
    """[CVE-2024-34359, CVE-2026-5760, CVE-2025-61620]"""
    attack = "{{ 7 * 191 }}{% for x in range(9) %}{{ cycler.__init__.__globals__ }}{% endfor %}"
    tool = {"type": "function", "function": {"name": "f", "description": attack}}
    body = {
        "messages": [{"role": "user", "content": attack, "name": attack}],
        "tools": [tool],
        "chat_template": attack,
        "chat_template_kwargs": {"chat_template": attack, "documents": attack, "x": attack},
    }
    prompt = _prompt(target, body)
    assert attack in prompt
    assert "1337" not in prompt
    assert "builtin" not in prompt


def test_template_arguments_of_a_request_take_nothing_over(target: WholeServer) -> None:
    """Names that mean something to the renderer or the template's own functions [CVE-2025-62426]."""
    plain = _prompt(target, {"messages": [MESSAGE]})
    for name in [*RESERVED, "__class__", "_x", "self", "loop", "a-b", "", "a" * 10_000]:
        for value in ("x", [], None, True, 10**30, {"a": {}}):
            assert _prompt(target, {"messages": [MESSAGE], "chat_template_kwargs": {name: value}}) == plain
    assert status(target, {**BODY, "chat_template_kwargs": ["tokenize"]}) == 400


def _prompt(target: WholeServer, body: dict[str, Any]) -> str:
    """What the model would read."""
    told = target.post("/tokenize", body)
    assert told.status == 200, told
    return str(target.post("/detokenize", {"tokens": told.body["tokens"]}).body["content"])


def test_a_template_that_explodes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a conversation's length, and by its arguments; the next request is served [CVE-2026-115911]."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    cubic = (
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% set x = c %}"
        "{% endfor %}{% endfor %}{% endfor %}{{ 'ab' * (many or 1) }}"
    )
    known = text_parts()
    text = TextParts(known.tokenizer, ChatTemplate({"default": cubic}), None, None, {})
    with serving(text=text) as server, server.client() as client:
        for body in (
            {"messages": [MESSAGE] * 3000},
            {"messages": [MESSAGE], "chat_template_kwargs": {"many": 10**12}},
        ):
            answer = client.post(CHAT, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "chat_template_error")
        assert client.post(CHAT, json=BODY).status_code == 200


SCHEMAS: list[Any] = [
    {"type": 7},
    {"type": ["object", {}]},
    {"properties": []},
    {"properties": {"a": 3, "b": None, "": {"type": "x" * 10_000}}},
    {"required": "all", "enum": {}, "pattern": "(a+)+$" * 100},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"anyOf": [{"anyOf": [{"anyOf": [{}]}]}] * 500},
    {"properties": {"a\x00b\u202e": {"minimum": -(10**300), "multipleOf": 0}}},
]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_tool_schemas_that_make_no_sense(target: WholeServer, schema: Any) -> None:
    """Taken as text or refused; the engine lives [CVE-2025-48944, CVE-2026-105757]."""
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        assert status(target, {**BODY, "tools": [tool], "tool_choice": choice}) in (200, 400)
    tools = [{"name": "f", "input_schema": schema}]
    assert status(target, {**BODY, "tools": tools}, "/v1/messages") in (200, 400)
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    assert status(target, {**BODY, "response_format": form}) in (200, 400)


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\udfff x"', '"a\\ud83d"', '"\\u0000"', '"\\uffff\\ufffe"'])
def test_text_that_is_none(target: WholeServer, text: str) -> None:
    """Half characters, in every place that text can come in."""
    tool = (
        f'{{"type":"function","function":{{"name":"f","description":{text},"parameters":{{{text}:{text}}}}}}}'
    )
    bodies = [
        f'{{"messages":[{{"role":"user","content":{text}}}],"max_tokens":1}}',
        f'{{"messages":[{{"role":{text},"content":"x"}}],"max_tokens":1}}',
        f'{{"messages":[{{"role":"user","content":"x","name":{text}}}],"tools":[{tool}],"max_tokens":1}}',
        f'{{"messages":[{{"role":"user","content":"x"}}],"stop":{text},"max_tokens":1}}',
        f'{{"messages":[{{"role":"user","content":"x"}}],"chat_template_kwargs":{{{text}:{text}}},"max_tokens":1}}',
        f'{{"messages":[{{"role":"user","content":"x"}}],"model":{text},"max_tokens":1}}',
    ]
    escaped = json.dumps(f'{{"a":{text}}}')
    call = f'{{"role":"assistant","tool_calls":[{{"function":{{"name":"f","arguments":{escaped}}}}}]}}'
    bodies.append(f'{{"messages":[{{"role":"user","content":"x"}},{call}],"max_tokens":1}}')
    for body in bodies:
        assert status(target, body.encode()) in (200, 400), body


@pytest.mark.parametrize("namespace", [{"cache_salt": 3}, {"cache_salt": ""}, {"namespace": "a" * 10_000}])
def test_a_cache_cannot_be_chosen_by_a_request(target: WholeServer, namespace: dict[str, Any]) -> None:
    """[CVE-2026-105756, CVE-2026-3108]"""
    assert status(target, {**BODY, **namespace}) == 200


def test_prompts_of_equal_shape_share_no_more_than_their_beginning(target: WholeServer) -> None:
    """Ids are compared, all of them: no hash stands for them [GHSA-rm76-4mrf-v9r8, CVE-2025-25183]."""
    ids = list(range(300, 900))
    told: list[int] = []
    for at in (599, 300, 1):
        prompt = [*ids[:at], ids[at] ^ 1, *ids[at + 1 :]]
        for asked in (ids, prompt):
            body = {"prompt": asked, "max_tokens": 1, "temperature": 0}
            answer = target.post("/v1/completions", body).body
            told.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert told[-1] <= at
    assert max(told) > 300


def test_headers_without_bounds(target: WholeServer) -> None:
    """[CVE-2025-48956]"""
    assert raw(target.port, "GET", "/health", headers={"X-Long": "x" * 33_000})[0] == 431
    assert raw(target.port, "GET", "/health", headers={f"X-{n}": "x" * 20 for n in range(2000)})[0] == 431
    assert raw(target.port, "GET", "/" + "x" * 70_000)[0] in (400, 404, 414, 431)
    with socket.create_connection(("127.0.0.1", target.port), timeout=60) as connection:
        closed = threading.Event()

        def flood() -> None:
            try:
                for _ in range(1000):
                    connection.sendall(b"X: " + b"x" * 1000 + b"\r\n")
            except OSError:
                pass
            closed.set()

        connection.sendall(b"GET / HTTP/1.1\r\n")
        threading.Thread(target=flood, daemon=True).start()
        assert parsed(received(connection))[0] in (0, 431)
        assert closed.wait(30)


def test_slow_clients_hold_nobody_up(target: WholeServer) -> None:
    """Hundreds that never end their headers or their body: others are served, they are let go [slowloris]."""
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    heads = [b"GET /health HTTP/1.1\r\nHost: loc", post + b"Content-Length: 1000\r\n\r\n{"]
    slow = [socket.create_connection(("127.0.0.1", target.port), timeout=60) for _ in range(300)]
    try:
        for at, connection in enumerate(slow):
            connection.sendall(heads[at % 2])
        assert target.ask("hello", 2).answered
        assert target.health()["status"] == "ok"
        assert parsed(received(slow[0]))[0] == 408
        assert parsed(received(slow[1]))[0] == 408
    finally:
        for connection in slow:
            connection.close()
