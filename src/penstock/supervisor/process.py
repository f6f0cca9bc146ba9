"""One engine process: started, killed, reaped, its last words kept.

Owns the process and the descriptors made for it. The engine has a session of its own, so that Ctrl-C in the
terminal reaches the front alone; it holds the only other end of the socketpair, so that each side's end is
the other's notice. A thread reaps it (works in any thread and loop, leaves no zombie), another reads what it
prints. Starting takes the few milliseconds of a vfork and exec; nothing else waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from penstock.page import Page
from penstock.platform import PYTHON, engine_environment

COMMAND = (*PYTHON, "-m", "penstock.engine")
LINE_BOUND = 2000
LINES_PER_SECOND = 200
TAIL_LINES = 80
_SOCKET_BUFFER = 1 << 20
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_log = logging.getLogger("penstock.engine")


def describe_exit(code: int, platform: str = sys.platform) -> str:
    """A return code (negative: a signal, as subprocess has it) in words for people."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"killed by signal {-code}"
    hints = {"SIGKILL": "by hand, or by the system for memory"}
    if platform == "linux":
        hints["SIGSEGV"] = "which on Linux is what a failed allocation looks like"
        hints["SIGKILL"] = "by hand, or by the kernel's out-of-memory killer"
    hint = hints.get(name)
    return f"killed by signal {-code} ({name})" + (f", {hint}" if hint else "")


class EngineProcess:
    """A started engine. `on_exit(code)` is called once, on the event loop, when it has been reaped."""

    def __init__(
        self,
        command: Sequence[str],
        epoch: int,
        on_exit: Callable[[int], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it. Raises OSError or RuntimeError where the system refuses; nothing is left open then."""
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._over = False
        self._last_words: deque[str] = deque(maxlen=TAIL_LINES)
        environment = engine_environment(os.environ if environment is None else environment)
        environment.pop("PENSTOCK_API_KEY", None)  # the engine may run a model's own code
        environment |= {"PYTHONFAULTHANDLER": "1", "PENSTOCK_ENGINE_EPOCH": str(epoch)}
        self.page = Page.create()
        self.socket, theirs = socket.socketpair()
        try:
            for end in (self.socket, theirs):
                _widen(end)
            descriptors = (theirs.fileno(), self.page.fd)
            self._process = subprocess.Popen(
                [*command, "--socket-fd", str(descriptors[0]), "--page-fd", str(descriptors[1])],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
            reader = threading.Thread(target=self._read_output, name="engine-output", daemon=True)
            reader.start()
            threading.Thread(target=self._reap, args=(reader,), name="engine-reaper", daemon=True).start()
        except BaseException:
            self.socket.close()  # which ends it, if it has been started
            self.page.close()
            raise
        finally:
            theirs.close()
        self.page.close_fd()
        self.pid = self._process.pid

    @property
    def last_words(self) -> list[str]:
        """The last lines it printed, oldest first."""
        return list(self._last_words)

    def kill(self, stacks: bool, grace: float) -> None:
        """SIGKILL; with `stacks`, SIGABRT before it, and `grace` seconds to dump them. Returns at once."""
        if not stacks:
            self._signal(signal.SIGKILL)
            return
        self._signal(signal.SIGABRT)
        # A stopped process takes no other signal before it is continued.
        self._signal(signal.SIGCONT)
        self._loop.call_later(grace, self._signal, signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if not self._over:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _reap(self, reader: threading.Thread) -> None:
        code = self._process.wait()
        self._over = True
        reader.join(timeout=0.5)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._on_exit, code)

    def _read_output(self) -> None:
        """Logs what it prints, at the level a line names (`WARNING:message`), else at DEBUG; bounded."""
        output = self._process.stdout
        assert output is not None
        second, count = 0.0, 0
        with output:
            while raw := output.readline(LINE_BOUND):
                level, line = _split_level(raw.decode("utf-8", "replace").rstrip())
                self._last_words.append(line)
                now = time.monotonic()
                if now - second >= 1.0:
                    if count > LINES_PER_SECOND:
                        _log.warning("the engine printed %d more lines", count - LINES_PER_SECOND)
                    second, count = now, 0
                count += 1
                if count <= LINES_PER_SECOND:
                    _log.log(level, "%s", line)


def _split_level(line: str) -> tuple[int, str]:
    level, colon, message = line.partition(":")
    if colon and level in _LEVELS:
        return getattr(logging, level), message
    return logging.DEBUG, line


def _widen(end: socket.socket) -> None:
    # Darwin's default of 8 KiB would cut a long prompt into thirty writes.
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
