"""What no client should send, over a raw socket: a 4xx that names the field, and the next request works."""

from __future__ import annotations

import json
import socket

import pytest
from tests.support.serve_scripted import ScriptedServer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGE = '{"role": "user", "content": "x"}'


def chat(more: str = "", messages: str = f"[{MESSAGE}]") -> bytes:
    return f'{{"messages": {messages}{", " if more else ""}{more}}}'.encode()


# name: (path, body, status, param)
TABLE: dict[str, tuple[str, bytes, int, str | None]] = {
    "nothing": (CHAT, b"", 400, None),
    "no JSON": (CHAT, b"hello", 400, None),
    "a body cut off": (CHAT, chat()[:-5], 400, "messages[0].content"),
    "a trailing comma": (CHAT, b'{"messages": [],}', 400, None),
    "two bodies": (CHAT, chat() + chat(), 400, None),
    "a list": (CHAT, b"[1]", 400, None),
    "null": (CHAT, b"null", 400, None),
    "bad UTF-8": (CHAT, chat().replace(b'"x"', b'"\xff"'), 400, "messages[0].content"),
    "a lone surrogate": (CHAT, chat(messages='[{"role": "user", "content": "\\ud800"}]'), 400,
                         "messages[0].content"),
    "no messages": (CHAT, b"{}", 400, "messages"),
    "messages a string": (CHAT, chat(messages='"hi"'), 400, "messages"),
    "no message": (CHAT, chat(messages="[]"), 400, "messages"),
    "a message a string": (CHAT, chat(messages='["hi"]'), 400, "messages[0]"),
    "no role": (CHAT, chat(messages='[{"content": "x"}]'), 400, "messages[0].role"),
    "content a number": (CHAT, chat(messages='[{"role": "user", "content": 3}]'), 400, "messages[0].content"),
    "an image": (CHAT, chat(messages='[{"role": "user", "content": [{"type": "image_url"}]}]'), 400,
                 "messages[0].content[0].type"),
    "max_tokens a string": (CHAT, chat('"max_tokens": "5"'), 400, "max_tokens"),
    "max_tokens negative": (CHAT, chat('"max_tokens": -1'), 400, "max_tokens"),
    "max_tokens a fraction": (CHAT, chat('"max_tokens": 1.5'), 400, "max_tokens"),
    "temperature negative": (CHAT, chat('"temperature": -0.1'), 400, "temperature"),
    "temperature NaN": (CHAT, chat('"temperature": NaN'), 400, "temperature"),
    "temperature infinite": (CHAT, chat('"temperature": 1e999'), 400, "temperature"),
    "top_p over 1": (CHAT, chat('"top_p": 1.1'), 400, "top_p"),
    "top_k a float": (CHAT, chat('"top_k": 2.5'), 400, "top_k"),
    "min_p a list": (CHAT, chat('"min_p": [0.1]'), 400, "min_p"),
    "seed beyond 64 bits": (CHAT, chat('"seed": 36893488147419103232'), 400, "seed"),
    "n of a million": (CHAT, chat('"n": 1000000'), 400, "n"),
    "n zero": (CHAT, chat('"n": 0'), 400, "n"),
    "stream a word": (CHAT, chat('"stream": "yes"'), 400, "stream"),
    "stream_options a word": (CHAT, chat('"stream_options": "usage"'), 400, "stream_options"),
    "an empty stop": (CHAT, chat('"stop": ""'), 400, "stop"),
    "stops of numbers": (CHAT, chat('"stop": ["a", 1]'), 400, "stop[1]"),
    "too many stops": (CHAT, chat('"stop": ' + json.dumps(["x"] * 5000)), 400, "stop"),
    "a bias for no id": (CHAT, chat('"logit_bias": {"x": 1}'), 400, "logit_bias"),
    "a bias beyond the vocabulary": (CHAT, chat('"logit_bias": {"99999999": 1}'), 400, "logit_bias"),
    "too many top_logprobs": (CHAT, chat('"logprobs": true, "top_logprobs": 21'), 400, "top_logprobs"),
    "tools a word": (CHAT, chat('"tools": "all"'), 400, "tools"),
    "a tool without a name": (CHAT, chat('"tools": [{"type": "function", "function": {}}]'), 400,
                              "tools[0].function.name"),
    "adapters": (CHAT, chat('"adapters": "/etc"'), 400, "adapters"),
    "a draft model": (CHAT, chat('"draft_model": "/etc"'), 400, "draft_model"),
    "nested deep": (CHAT, chat('"x": ' + "[" * 5000 + "]" * 5000), 400, None),
    "no prompt": (TEXT, b"{}", 400, "prompt"),
    "prompt an object": (TEXT, b'{"prompt": {}}', 400, "prompt"),
    "prompt of an unknown id": (TEXT, b'{"prompt": [1, 99999999]}', 400, "prompt[1]"),
    "prompt of a negative id": (TEXT, b'{"prompt": [-1]}', 400, "prompt[0]"),
    "logprobs of a hundred": (TEXT, b'{"prompt": "x", "logprobs": 100}', 400, "logprobs"),
}  # fmt: skip


def exchange(server: ScriptedServer, request: bytes, *, half_close: bool = False) -> tuple[int, bytes]:
    """Sends bytes as they are; the answer's status and body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]) if head else 0, body


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if not any(header.lower().startswith("content-type") for header in headers):
        lines.append("Content-Type: application/json")
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def assert_works(server: ScriptedServer) -> None:
    status, body = exchange(server, post(CHAT, chat()))
    assert (status, b'"fine"' in body) == (200, True)


@pytest.mark.parametrize("name", TABLE)
def test_refused_with_the_field_named(server: ScriptedServer, name: str) -> None:
    path, body, wanted, param = TABLE[name]
    status, answer = exchange(server, post(path, body))
    assert status == wanted, answer
    error = json.loads(answer)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    assert_works(server)


REQUESTS = {
    "a body that never comes whole": (post(CHAT, chat(), "Content-Length: 5000"), (0, 400, 408)),
    "chunked nonsense": (post(CHAT, b"zz\r\nhello\r\n", "Transfer-Encoding: chunked"), (400,)),
    "a negative length": (post(CHAT, chat(), "Content-Length: -1"), (400,)),
    "a length too large": (post(CHAT, chat(), "Content-Length: 99999999999"), (413,)),
    "plain text": (post(CHAT, chat(), "Content-Type: text/plain"), (415,)),
    "another host": (post(CHAT, chat()).replace(b"localhost", b"evil.example"), (403,)),
    "a page's origin": (post(CHAT, chat(), "Origin: https://evil.example"), (403,)),
    "no such path": (post("/v1/nothing", b"{}"), (404,)),
    "a wrong method": (b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (405,)),
    "no HTTP at all": (b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\r\n\r\n", (400,)),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_refused_whole(server: ScriptedServer, name: str) -> None:
    request, statuses = REQUESTS[name]
    status, answer = exchange(server, request, half_close=name.startswith("a body"))
    assert status in statuses, answer[:300]
    assert b"Traceback" not in answer
    assert_works(server)


def test_chunked_bodies_are_taken(server: ScriptedServer) -> None:
    body = chat()
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body) + b"0\r\n\r\n"
    status, answer = exchange(server, post(CHAT, chunks, "Transfer-Encoding: chunked"))
    assert (status, b'"fine"' in answer) == (200, True)


def test_null_means_absent_and_unknown_fields_pass(server: ScriptedServer) -> None:
    names = ("max_tokens", "temperature", "stream", "model", "stop", "tools", "n", "seed", "logit_bias")
    nulls = ", ".join(f'"{name}": null' for name in names)
    status, answer = exchange(server, post(CHAT, chat(nulls + ', "store": false, "user": "me", "x": [1]')))
    assert (status, b'"fine"' in answer) == (200, True)


def test_a_cap_beyond_all_numbers_is_no_cap(server: ScriptedServer) -> None:
    status, answer = exchange(server, post(CHAT, chat('"max_tokens": 1' + "0" * 30)))
    assert (status, b'"fine"' in answer) == (200, True)


def test_nothing_of_this_is_in_the_log_as_a_fault(server: ScriptedServer) -> None:
    assert "Traceback" not in server.log()
