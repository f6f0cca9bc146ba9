"""A proxy in front of a server that keeps what clients ask: paths and bodies, in the order of arrival.

Nothing is written to disk: what an agent sends holds its vendor's texts.
"""

from __future__ import annotations

import http.client
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_NOT_PASSED = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding"}


@dataclass(frozen=True)
class Recorded:
    """A POST of a JSON body."""

    path: str
    body: dict[str, Any]


class Recorder:
    """`with Recorder(port) as recorder`: clients are pointed at `url`; `requests` is what they sent."""

    def __init__(self, port: int) -> None:
        """`port`: of the server on this machine to which everything is passed on."""
        self.requests: list[Recorded] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._pass_on(b"")

            def do_HEAD(self) -> None:
                self._pass_on(b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                recorder.requests.append(Recorded(self.path.partition("?")[0], json.loads(body)))
                self._pass_on(body)

            def _pass_on(self, body: bytes) -> None:
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                kept = {k: v for k, v in self.headers.items() if k.lower() not in _NOT_PASSED}
                try:
                    upstream.request(self.command, self.path, body or None, kept)
                    answer = upstream.getresponse()
                    self.send_response(answer.status)
                    self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                    self.send_header("Connection", "close")
                    self.end_headers()
                    while data := answer.read1(1 << 16):
                        self.wfile.write(data)
                        self.wfile.flush()
                except OSError:
                    pass  # a side has hung up: the other one is told by the end of its connection
                finally:
                    upstream.close()
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet: the server under test has a log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
