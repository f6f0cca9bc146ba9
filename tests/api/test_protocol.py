"""What clients send late, slowly or too much of: bounded and refused in words, others served meanwhile."""

from __future__ import annotations

import json
import resource
import socket
import time

import pytest
from tests.support.fake_backend import Server, serving, wait_until

from penstock.api.protocol import SPARE_DESCRIPTORS, Bounds, room_for_connections

QUICK = Bounds(headers=0.3, body_look=0.3, pace=1000.0, linger=0.3)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST = json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}).encode()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def rest(sock: socket.socket) -> bytes:
    """All that still comes until the server closes."""
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    sock.close()
    return b"".join(parts)


def served(server: Server) -> bool:
    with server.client() as client:
        return client.get("/health").status_code == 200


def trickle(sock: socket.socket, data: bytes, every: float = 0.02) -> None:
    for byte in data:
        try:
            sock.send(bytes([byte]))
        except OSError:
            return
        time.sleep(every)


def test_a_connection_without_a_word_is_closed() -> None:
    with serving(bounds=QUICK) as server:
        assert rest(connect(server)) == b""


def test_headers_at_a_byte_a_time_are_refused() -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        trickle(sock, HEAD)
        answer = rest(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_empty_lines_do_not_keep_a_connection() -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        trickle(sock, b"\r\n" * 50)
        rest(sock)  # it ends


def test_a_body_at_a_byte_a_time_is_refused() -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        sock.send(HEAD + b"Content-Length: 100000\r\n\r\n")
        trickle(sock, b" " * 50)
        answer = rest(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"too slowly" in answer


def test_a_body_that_keeps_its_pace_is_served() -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        body = REQUEST.ljust(4000)
        sock.send(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 500):
            sock.send(body[at : at + 500])
            time.sleep(0.1)
        assert rest(sock).startswith(b"HTTP/1.1 200 ")


def test_headers_of_a_megabyte_are_refused_early() -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        sent = 0
        try:
            while sent < 4_000_000:
                sent += sock.send(b"X-A: " + b"a" * 16_000 + b"\r\n" if sent else HEAD)
        except OSError:
            pass
        sock.close()
        assert served(server)
    assert sent < 4_000_000


def test_headers_over_the_bound_have_their_own_answer() -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        sock.send(HEAD)
        sock.send(b"X-A: " + b"a" * 70_000)
        assert rest(sock).startswith(b"HTTP/1.1 431 ")


def test_a_large_body_behind_its_headers_is_not_taken_for_headers() -> None:
    with serving(bounds=QUICK) as server, server.client() as client:
        for _ in range(3):  # on one connection
            content = "x" * 200_000
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
            assert client.post("/v1/chat/completions", json=body).status_code in (200, 400)
        assert served(server)


def test_what_follows_a_refused_body_is_cut_off() -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        sock.send(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")
        sent = 0
        end = time.monotonic() + 10
        try:
            while time.monotonic() < end:
                sent += sock.send(b" " * 1000)
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() < end, "it was still read"
        sock.close()


def test_a_request_in_progress_has_no_deadline() -> None:
    """A keepalive connection: served, idle for a while, served again."""
    with serving(bounds=QUICK) as server, server.client() as client:
        for _ in range(3):
            assert client.get("/health").status_code == 200
            time.sleep(0.5)


def offering(path: bytes, body: bytes, last: bool = False) -> bytes:
    """A request as a client sends it that would rather speak HTTP/2."""
    kept = b"close, " if last else b""
    offer = b"Connection: %bUpgrade, HTTP2-Settings\r\nupgrade: h2c\r\nHTTP2-Settings: AAQAAP__\r\n" % kept
    head = HEAD.replace(b"/v1/chat/completions", path) + offer
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_an_offer_of_another_protocol_is_ignored_wherever_it_is_cut() -> None:
    text = b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    body = json.dumps({"content": text.decode()}).encode()
    data = offering(b"/tokenize", body, last=True)
    with serving() as server:
        for cut in range(1, len(data), 7):
            sock = connect(server)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.send(data[:cut])
            time.sleep(0.002)
            sock.send(data[cut:])
            answer = rest(sock)
            assert answer.startswith(b"HTTP/1.1 200 "), cut
            assert b'"count":%d,' % len(text) in answer
            assert answer.count(b"HTTP/1.1 ") == 1


def test_requests_that_offer_another_protocol_share_a_connection() -> None:
    chunked = HEAD.replace(b"/v1/chat/completions", b"/tokenize")
    chunked += b"Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b'5\r\n{"pro\r\nc\r\nmpt": "abc"}\r\n0\r\n\r\n'
    texts = [b"a" * count for count in range(1, 30)]
    requests = [offering(b"/tokenize", b'{"content": "%b"}' % text) for text in texts]
    plain = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving() as server:
        sock = connect(server)
        sock.send(plain.join([*requests, chunked, offering(b"/tokenize", b'{"content": ""}', last=True)]))
        answer = rest(sock)
    assert answer.count(b"HTTP/1.1 200 ") == answer.count(b"HTTP/1.1 ") == 2 * len(texts) + 3
    counts = [int(part.split(b",")[0]) for part in answer.split(b'"count":')[1:]]
    assert counts == [*map(len, texts), 3, 0]


def test_an_offer_of_another_protocol_does_not_loosen_the_bounds() -> None:
    body = b" " * 10_000
    data = offering(b"/tokenize", body)
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        trickle(sock, data[:-10_000])
        assert rest(sock).startswith(b"HTTP/1.1 408 ")
        sock = connect(server)
        sock.send(data[:-10_000])
        trickle(sock, body[:50])
        assert b"too slowly" in rest(sock)
        sock = connect(server)
        sock.send(data[: data.index(b"Content-Length")])
        sock.send(b"X-A: " + b"a" * 70_000)
        assert rest(sock).startswith(b"HTTP/1.1 431 ")
        sock = connect(server)
        sock.send(b"CONNECT a:80 HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 4")
        sock.close()


def test_the_longest_idle_connection_makes_room() -> None:
    with serving(bounds=Bounds(connections=20)) as server:
        idle = [connect(server) for _ in range(30)]
        assert served(server)
        wait_until(lambda: server.on_loop(lambda: len(server.server.server_state.connections)) <= 20)
        assert rest(idle[0]) == b""
        idle[-1].send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[-1].recv(4096).startswith(b"HTTP/1.1 200 ")
        for sock in idle:
            sock.close()


def test_no_more_connections_than_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        bounds = room_for_connections(Bounds())
        after = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert after >= soft
        assert bounds.connections <= max(1, after - SPARE_DESCRIPTORS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("what", [b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"])
def test_what_is_no_http_is_refused(what: bytes) -> None:
    with serving(bounds=QUICK) as server:
        sock = connect(server)
        sock.send(what)
        assert rest(sock).startswith(b"HTTP/1.1 4")
        assert served(server)
