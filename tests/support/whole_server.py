"""`penstock serve` as users start it, under limits set from outside: no memory option, no stand-ins.

`WholeServer` owns the process tree and ends it. `ask` is one chat request and what came of it, in a form
that tests can compare: an answer is whole, or there is a status and an error body, or the connection broke.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
PENSTOCK = (sys.executable, "-c", "import sys; from penstock.cli import main; sys.exit(main())")

_OWN = {"OPENBLAS_NUM_THREADS": "1"}
"""BLAS's threads wait for each other by spinning: where other things run, too, one is quicker."""

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What came of a request. `status` 0: no answer at all."""

    status: int
    body: dict[str, Any]

    @property
    def answered(self) -> bool:
        """Whether the answer is whole."""
        return self.status == 200 and self.finish_reason in ("stop", "length")

    @property
    def finish_reason(self) -> str | None:
        return self.body["choices"][0]["finish_reason"] if self.status == 200 else None

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.body.get("error") or {})


class WholeServer:
    """A running server on a free port. `with WholeServer(...)` waits until it serves and ends it."""

    def __init__(
        self,
        model: Path,
        scratch: Path,
        *flags: str,
        data_limit: int | None = None,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = PENSTOCK,
    ) -> None:
        """`data_limit`: RLIMIT_DATA in bytes, inherited by the whole tree; `program`: what is started."""
        self.log_file = scratch / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if data_limit is not None:
                resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))

        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*program, "serve", str(model), "--port", str(self.port), *flags],
                cwd=ROOT,
                env={**os.environ, **_OWN, "XDG_CACHE_HOME": str(scratch / "cache"), **(environment or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=limit,  # noqa: PLW1509 - started before any thread of a test
            )

    def __enter__(self) -> WholeServer:
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, seconds: float = 90.0) -> None:
        """Until /health says 200. Raises AssertionError with the log's end if it never does."""
        end = time.monotonic() + seconds
        while self.health().get("status") != "ok":
            assert self.process.poll() is None, f"the server has exited:\n{self.log()[-3000:]}"
            assert time.monotonic() < end, f"not ready after {seconds} s:\n{self.log()[-3000:]}"
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM, then SIGKILL to the group; the front's exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            return self.process.wait() if self._kill() else -1
        finally:
            self._kill()

    def _kill(self) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return True

    def log(self) -> str:
        """All that the server has written."""
        return self.log_file.read_text(errors="replace")

    def health(self) -> dict[str, Any]:
        """The body of /health, whatever its status; empty where nobody answers."""
        return self.get("/health").body

    def get(self, path: str) -> Outcome:
        """GET a path."""
        return self._send(urllib.request.Request(self.url + path), 10.0)

    def ask(self, prompt: str, most: int, *, timeout: float = 300.0, **fields: Any) -> Outcome:
        """One chat request that is not streamed."""
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": most, "temperature": 0}
        return self.post("/v1/chat/completions", {**body, **fields}, timeout)

    def post(self, path: str, body: dict[str, Any], timeout: float = 300.0) -> Outcome:
        """POST a JSON body."""
        headers = {"Content-Type": "application/json"}
        return self._send(
            urllib.request.Request(self.url + path, json.dumps(body).encode(), headers), timeout
        )

    def _send(self, request: urllib.request.Request, timeout: float) -> Outcome:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Outcome(answer.status, json.load(answer))
        except urllib.error.HTTPError as refused:
            with refused:
                return Outcome(refused.code, json.loads(refused.read() or b"{}"))
        except (OSError, ValueError):
            return Outcome(0, {})


def all_at_once(one: Callable[[int], T], numbers: Iterable[int]) -> list[T]:
    """`one` for each number, each in a thread of its own; results in order."""
    chosen = list(numbers)
    with ThreadPoolExecutor(len(chosen)) as pool:
        return list(pool.map(one, chosen))


class Books:
    """Watches the engine's books and its memory, several times a second, while the block runs."""

    def __init__(self, server: WholeServer) -> None:
        self.server = server
        self.seen = 0
        self.most_held = 0
        self.ceiling = 0
        self.resident_peak = 0
        """Bytes that the system counted at most since the engine's start; 0 where it does not tell."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Books:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            health = self.server.health()
            memory, engine = health.get("memory"), health.get("engine")
            if not memory or not engine:
                continue
            self.seen += 1
            self.most_held = max(self.most_held, sum(memory["accounts"].values()))
            self.ceiling = memory["ceiling"]
            self.resident_peak = max(self.resident_peak, _high_water(engine["pid"]))


def _high_water(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0
