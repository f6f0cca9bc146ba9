"""`penstock serve` as a process of its own, with the answering engine where the MLX engine would be.

`ScriptedServer` is for tests; run as a module this file is the server: the real command line, front, API and
supervisor, with one thing exchanged, the engine's command. Keepalives can come quicker than in production.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVER = (sys.executable, "-m", "tests.support.serve_scripted")


class ScriptedServer:
    """A running server. Its rules can be changed at any time; `events()` is what its engine saw."""

    def __init__(self, model: Path, scratch: Path, *flags: str, keepalive: float | None = None) -> None:
        self.rules_file, self.journal = scratch / "rules.json", scratch / "journal.jsonl"
        self.log_file = scratch / "server.log"
        self.rules_file.write_text("[]")
        self.journal.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {
            **os.environ,
            "SCRIPTED_RULES": str(self.rules_file),
            "SCRIPTED_JOURNAL": str(self.journal),
            "SCRIPTED_KEEPALIVE": str(keepalive or ""),
        }
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*SERVER, "serve", str(model), "--port", str(self.port), "--log-level", "DEBUG", *flags],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> ScriptedServer:
        try:
            self.until(self._healthy, 30.0)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """SIGTERM, then SIGKILL; the front's exit code."""
        self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()

    def rules(self, *rules: dict[str, Any]) -> None:
        """Replaces the rules, for requests that come from now on."""
        staged = self.rules_file.with_suffix(".new")
        staged.write_text(json.dumps(rules))
        staged.rename(self.rules_file)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """What the engine saw, oldest first; all of it or one kind."""
        lines = self.journal.read_text().splitlines()
        return [found for line in lines if event in (None, (found := json.loads(line))["event"])]

    def until(self, true: Callable[[], Any], seconds: float = 10.0) -> Any:
        """Waits for a condition. Raises AssertionError with the log's end where it does not come true."""
        end = time.monotonic() + seconds
        while not (found := true()):
            assert self.process.poll() is None, f"the server has exited:\n{self.log()[-3000:]}"
            assert time.monotonic() < end, f"still not true after {seconds} s:\n{self.log()[-3000:]}"
            time.sleep(0.01)
        return found

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False


def main(arguments: Iterable[str]) -> int:
    from penstock import cli
    from penstock.api import service
    from penstock.supervisor import backend

    command = (sys.executable, "-m", "tests.support.answering_engine")
    backend.Backend.__init__.__defaults__ = (command,)
    if keepalive := os.environ["SCRIPTED_KEEPALIVE"]:
        timing = service.Service.__dataclass_fields__["timing"].default
        object.__setattr__(timing, "keepalive", float(keepalive))
    return int(cli.main(list(arguments)) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
