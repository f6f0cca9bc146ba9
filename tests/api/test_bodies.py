"""Whatever bytes come in: a request, or a 4xx that names the field; and the server goes on."""

from __future__ import annotations

import gzip
import json
import socket
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.fake_backend import CONTEXT, VOCAB, Server, serving

from penstock import wire
from penstock.api import params
from penstock.api.body import MAX_BODY, MAX_DEPTH, decode, path_at
from penstock.api.openapi import openapi
from penstock.api.schema import ChatRequest, CompletionRequest
from penstock.errors import Kind, PenstockError

MESSAGES = '"messages":[{"role":"user","content":"x"}]'


def refusal(body: bytes) -> PenstockError:
    with pytest.raises(PenstockError) as caught:
        decode(body, ChatRequest)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ('"temperature":NaN', "temperature"),
        ('"temperature":-Infinity', "temperature"),
        ('"temperature":1e400', "temperature"),
        ('"temperature":-0.1', "temperature"),
        ('"temperature":"0.5"', "temperature"),
        ('"temperature":true', "temperature"),
        ('"top_p":1.01', "top_p"),
        ('"top_k":2.0', "top_k"),
        ('"max_tokens":0', "max_tokens"),
        ('"max_tokens":1.5', "max_tokens"),
        ('"max_completion_tokens":-5', "max_completion_tokens"),
        (f'"seed":1{"0" * 30}', "seed"),
        ('"n":17', "n"),
        ('"stop":""', "stop"),
        ('"stop":["a",""]', "stop[1]"),
        (f'"stop":{json.dumps(["a"] * 17)}', "stop"),
        ('"stop":{"a":1}', "stop"),
        ('"top_logprobs":21', "top_logprobs"),
        ('"logprobs":5', "logprobs"),
        ('"logit_bias":{"1":"a"}', "logit_bias"),
        ('"logit_bias":[1]', "logit_bias"),
        ('"stream":"yes"', "stream"),
        ('"stream_options":{"include_usage":1}', "stream_options.include_usage"),
        ('"tools":[{"type":"function","function":{}}]', "tools[0].function.name"),
        ('"messages":[]', "messages"),
        ('"messages":null', "messages"),
        ('"messages":"hi"', "messages"),
        ('"messages":[{"role":"user","content":"x"},{"content":"x"}]', "messages[1].role"),
        (
            '"messages":[{"role":"user","content":[{"type":"text"},{"text":"a"}]}]',
            "messages[0].content[1].type",
        ),
        ('"messages":[{"role":"user","content":"\\ud800"}]', "messages[0].content"),
        ('"messages":[{"role":"user","content":"\\udc00"}]', "messages[0].content"),
        ('"messages":[{"role":"user","content":"\\ud83dx"}]', "messages[0].content"),
        ('"messages":[{"role":"user"},{"role":"user","content":"cut', "messages[1].content"),
    ],
)
def test_the_field_at_fault_is_named(fields: str, param: str) -> None:
    error = refusal(f'{{{MESSAGES},"a":[{{"b":1}}],{fields}}}'.encode())
    assert error.param == param
    assert error.message.startswith((f"{param}: ", "The body is not valid JSON, in " + param))
    assert error.kind.value.status == 400
    assert "`" not in error.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "too early"),
        (b"hello", "invalid character"),
        (b"[1]", "Expected object"),
        (b"{} {}", "trailing"),
        (b"\xff\xfe{}", "invalid character"),
        (b'{"a":' + b"[" * 100_000, "nested deeper"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"," + MESSAGES.encode() + b"}", "nested deeper"),
    ],
)
def test_hopeless_bodies(body: bytes, words: str) -> None:
    error = refusal(body)
    assert error.param is None
    assert words in error.message


@pytest.mark.parametrize(
    "values", ["[],", "{},", '{"role":"u","content":"x"},'], ids=["lists", "objects", "turns"]
)
def test_a_body_that_becomes_much_more_than_its_size_counts_for_it(values: str) -> None:
    """Small values take many times their text: they are refused by what they take, not by what was sent."""
    body = f'{{"messages":[{{"role":"user","content":"x"}},{values * 100_000}{{"role":"user"}}]}}'
    with serving(front_memory=40_000_000) as server, server.client() as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert client.post("/v1/completions", json={"prompt": "x" * 1000}).status_code == 200


def test_tools_are_bounded_together() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 1_000_000}}
    with serving() as server, server.client() as client:
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = client.post(
                path, json={"messages": [{"role": "user", "content": "x"}], "tools": [tool] * 5}
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


def test_bytes_that_are_not_utf8_are_found() -> None:
    error = refusal(b'{"messages":[{"role":"user","content":"\xff"}]}')
    assert (error.kind, error.param) == (Kind.INVALID_JSON, "messages[0].content")


def test_depth_up_to_the_cap_passes() -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    decode(f'{{{MESSAGES},"x":{deep}}}'.encode(), ChatRequest)


def test_null_is_absent_and_unknown_fields_pass() -> None:
    optional = [field.name for field in msgspec.structs.fields(ChatRequest) if field.name != "messages"]
    nulls = ",".join(f'"{name}":null' for name in optional)
    raw, request = decode(f'{{{MESSAGES},{nulls},"store":true,"user":3}}'.encode(), ChatRequest)
    assert request == decode(f"{{{MESSAGES}}}".encode(), ChatRequest)[1]
    assert raw["store"] is True
    params.refuse(request)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"adapters": "x"}, "adapters"),
        ({"draft_model": "x"}, "draft_model"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    body = json.dumps(json.loads(f"{{{MESSAGES}}}") | fields).encode()
    with pytest.raises(PenstockError) as caught:
        params.refuse(decode(body, ChatRequest)[1])
    assert (caught.value.kind, caught.value.param) == (Kind.UNSUPPORTED_FIELD, param)


def test_what_asks_for_nothing_more_is_taken() -> None:
    fields = (
        '"response_format":{"type":"text"},"tool_choice":"auto","functions":[],"function_call":"none",'
        '"modalities":["text"],"draft_model":"default_model","num_draft_tokens":3,"parallel_tool_calls":false,'
        '"reasoning_effort":"high","prompt_cache_key":"a"'
    )
    params.refuse(decode(f"{{{MESSAGES},{fields}}}".encode(), ChatRequest)[1])


def test_a_byte_order_mark_is_passed_over() -> None:
    marked = b"\xef\xbb\xbf{%b}" % MESSAGES.encode()
    assert decode(marked, ChatRequest) == decode(marked[3:], ChatRequest)


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    refusal(body)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.sampled_from([f.name for f in msgspec.structs.fields(CompletionRequest)]), _json)
def test_any_value_in_any_field(name: str, value: Any) -> None:
    """Either a 400, or a request that maps to sampling the engine can take."""
    sampling = _mapped(json.dumps({"prompt": "x", name: value}).encode())
    if isinstance(sampling, PenstockError):
        assert sampling.kind.value.status == 400
    else:
        packed = msgspec.msgpack.encode(sampling)
        assert msgspec.msgpack.decode(packed, type=wire.Sampling) == sampling


def _mapped(body: bytes) -> wire.Sampling | PenstockError:
    try:
        _, request = decode(body, CompletionRequest)
        params.refuse(request)
        params.most_tokens(request, None, CONTEXT)
        params.stops(request)
        return params.sampling(request, params.chosen_defaults({}, {}), VOCAB, CONTEXT)
    except PenstockError as error:
        return error


@given(_json, st.data())
def test_a_cut_body_never_confuses_the_path(value: Any, data: st.DataObject) -> None:
    body = json.dumps({"k": value}).encode()
    path_at(body, data.draw(st.integers(0, len(body))))


def test_the_schema_is_whole() -> None:
    document = openapi("1")
    text = msgspec.json.encode(document).decode()
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= document["components"]["schemas"].keys()
    assert "messages" in document["components"]["schemas"]["ChatRequest"]["properties"]
    for name in ("Item", "ResponsesTool"):  # of a type that is left out they may hold anything
        ours, other = document["components"]["schemas"][name]["anyOf"]
        assert "namespace" in other["properties"]["type"]["not"]["enum"]
        assert other["properties"].keys() == {"type"} < ours["properties"].keys()


def _raw(server: Server, head: str, body: bytes = b"", *, shut: bool = False) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        lines = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{head}\r\n\r\n"
        connection.sendall(lines.encode() + body)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def test_limits_on_the_wire_and_the_next_request_works() -> None:
    json_type = "Content-Type: application/json\r\n"
    with serving() as server, server.client() as client:
        assert b" 413 " in _raw(server, f"{json_type}Content-Length: {MAX_BODY + 1}")[:20]
        assert b" 415 " in _raw(server, "Content-Type: text/plain\r\nContent-Length: 2", b"{}")[:20]
        assert b" 415 " in _raw(server, "Content-Length: 2", b"{}")[:20]
        plain, packed = b'{"prompt":"x"}', gzip.compress(b'{"prompt":"x"}')
        encoded = _raw(server, f"{json_type}Content-Encoding: gzip\r\nContent-Length: {len(packed)}", packed)
        assert (b" 415 " in encoded[:20], b"Content-Encoding" in encoded) == (True, True)
        encoded = _raw(server, f"{json_type}Content-Encoding: Identity\r\nContent-Length: 14", plain)
        assert b" 200 " in encoded[:20]
        assert b" 431 " in _raw(server, f"X: {'x' * 40_000}\r\nContent-Length: 2", b"{}")[:20]
        assert _raw(server, f"{json_type}Content-Length: 100", b'{"prompt":', shut=True) == b""
        chunks = b'5\r\n{"pro\r\nc\r\nmpt": "hi"} \r\n0\r\n\r\n'
        assert b" 200 " in _raw(server, f"{json_type}Transfer-Encoding: chunked", chunks)[:20]
        charset = {"content-type": "application/json; charset=utf-8"}
        assert client.post("/v1/completions", content=b'{"prompt":"x"}', headers=charset).status_code == 200


def test_a_streamed_body_over_the_cap_is_refused_before_it_is_whole() -> None:
    def endless() -> Any:
        yield b'{"prompt":"'
        for _ in range(MAX_BODY // 1_000_000 + 2):
            yield b"x" * 1_000_000

    with serving() as server, server.client() as client:
        response = client.post(
            "/v1/completions", content=endless(), headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
