"""What the server says on stderr: few lines, each for a person, each from here.

Owns the stream: lines, the progress line that a terminal redraws in place, the sums of repeated events.
Refuses: text of prompts or answers, and output of libraries. Invariant: at most one line a second of any
kind of repeated event, and a redrawn line never mixes with another.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from penstock.demo import BANNER
from penstock.sizes import gigabytes
from penstock.wire import Ready

_ADVICE_OFF = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",
}
_OUR_BUGS = ("asyncio", "uvicorn.error")
"""Loggers of libraries that report exceptions of our own code: their errors are shown, nothing else."""

PROGRESS_EVERY = 5.0
"""Seconds after which a prefill is worth a line, and between such lines."""
REPEATS_EVERY = 1.0
"""Seconds between lines of the same kind of repeated event."""

logger = logging.getLogger("penstock")


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """What a finished request's line tells. Times in seconds, counts in tokens, over all its choices."""

    id: str
    prompt: int
    cached: int = 0
    why: str = ""
    """Why no more of it was in the prompt cache."""
    queue: float = 0.0
    prefill: float = 0.0
    generated: int = 0
    decode: float = 0.0
    finish: str = "stop"

    def line(self) -> str:
        """'req 3f2: prompt 1,234 = 0 cached + 1,234 new, queue 0.0 s, prefill 1.2 s, 87 tokens …, stop'."""
        timed = self.generated > 1 and self.decode > 0
        rate = f" at {self.generated / self.decode:.1f} tok/s" if timed else ""
        why = f" ({self.why})" if self.why else ""
        return (
            f"req {self.id}: prompt {self.prompt:,} = {self.cached:,} cached + "
            f"{self.prompt - self.cached:,} new{why}, "
            f"queue {self.queue:.1f} s, prefill {self.prefill:.1f} s, "
            f"{self.generated:,} tokens{rate}, {self.finish}"
        )


class PrefillPace:
    """Decides when a prefill's progress is worth a line, and estimates what is left. Pure."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, float]] = {}
        """How far a prefill was when it was first seen or last spoken of, and when that was."""

    def note(self, id: str, done: int, total: int, now: float) -> str | None:
        """Progress at `now` (seconds, monotonic); the line for it, or None if it is too soon for one."""
        if done >= total:
            self.forget(id)
            return None
        done_then, said = self._open.setdefault(id, (done, now))
        if now - said < PROGRESS_EVERY:
            return None
        self._open[id] = done, now
        line = f"req {id}: prefill {done:,}/{total:,}, {100 * done // total} %"
        if done > done_then:
            line += f", ~{(now - said) / (done - done_then) * (total - done):.0f} s left"
        return line

    def forget(self, id: str) -> None:
        """The request's prefill has ended, one way or another."""
        self._open.pop(id, None)


class _Lines(logging.Handler):
    """Writes lines, and one redrawn line below them where the stream is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self.redraws = stream.isatty()
        self._drawn = False

    def emit(self, record: logging.LogRecord) -> None:
        redrawn = bool(getattr(record, "redrawn", False)) and self.redraws
        try:
            text = self.format(record)
            before = "\r\x1b[K" if self._drawn else ""
            if not _takes_more(self.stream):
                return
            self.stream.write(before + text + ("" if redrawn else "\n"))
            self._drawn = redrawn
            self.stream.flush()
        except (OSError, ValueError):
            return  # stderr is gone: nobody is left to tell


def _takes_more(stream: TextIO) -> bool:
    """Whether a line can be written at once: a terminal may be held, and a pipe full that nobody reads."""
    try:
        return bool(select.select([], [stream.fileno()], [], 0)[1])
    except io.UnsupportedOperation:
        return True  # it is in memory


class _Form(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if getattr(record, "bare", False):
            return text
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{text}"


class _Json(logging.Formatter):
    """A JSON object a line: when, how grave, whose, the words, and the fields of what they tell."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": datetime.fromtimestamp(record.created, UTC), "level": record.levelname.lower()}
        told |= {"logger": record.name, "message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(told).decode()


_pace = PrefillPace()
_lock = threading.Lock()
_clock: Callable[[], float] = time.monotonic
_waiting: dict[str, tuple[int, str]] = {}
"""Kinds of which a line was said within the last second: how many came since, and the last one's words."""


def setup(level: str = "INFO", stream: TextIO | None = None, form: str = "text") -> None:
    """Say `level` and above on `stream` (stderr), and silence every library. Call before importing them.

    `form`: text or json.
    """
    for name, value in _ADVICE_OFF.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    lines = _Lines(stream or sys.stderr)
    lines.setFormatter(_Json() if form == "json" else _Form())
    lines.redraws = lines.redraws and form != "json"
    logging.getLogger().handlers[:] = [logging.NullHandler()]
    for name, least in {logger.name: level, **dict.fromkeys(_OUR_BUGS, "ERROR")}.items():
        spoken = logging.getLogger(name)
        spoken.handlers[:], spoken.propagate = [lines], False
        spoken.setLevel(least)


def start_line(text: str) -> None:
    """A line of the start, which has at most ten."""
    logger.info(text)


def request_done(record: RequestRecord) -> None:
    """The one line of a request that was answered to its end."""
    _pace.forget(record.id)
    logger.info(record.line(), extra=_fields(asdict(record)))


def request_cancelled(id: str, generated: int) -> None:
    """The one quiet line of a request whose client went away."""
    _pace.forget(id)
    told = _fields({"id": id, "generated": generated, "finish": "client gone"})
    logger.info(f"req {id}: client gone after {generated:,} tokens", extra=told)


def request_failed(id: str, label: str, message: str) -> None:
    """The one line of a request that ended in an error; `label` is the error kind's."""
    _pace.forget(id)
    told = _fields({"id": id, "finish": "error", "kind": label})
    logger.warning(f"req {id}: {label}: {message}", extra=told)


def _fields(told: dict[str, Any]) -> dict[str, Any]:
    return {"fields": {"request": told}}


def progress(id: str, done: int, total: int) -> None:
    """A prefill stands at `done` of `total` tokens. Call as often as it is known: lines come every 5 s."""
    line = _pace.note(id, done, total, _clock())
    if line is not None:
        logger.info(line, extra={"redrawn": True})


def probe(method: str, path: str, status: int) -> None:
    """A request of /health, /v1/models or the like, answered."""
    logger.debug(f"{method} {path}: {status}")


def repeated(kind: str, message: str) -> None:
    """A warning that may come in numbers: said at once, those of the next second together after it."""
    with _lock:
        count, _ = _waiting.get(kind, (-1, ""))
        _waiting[kind] = (count + 1, message)
    if count < 0:
        logger.warning(message)
        _later(_say_waiting, kind)


def _say_waiting(kind: str) -> None:
    with _lock:
        count, message = _waiting.pop(kind)
        if count:
            _waiting[kind] = (0, "")
    if count:
        logger.warning(message if count == 1 else f"{message} (and {count - 1:,} more like it)")
        _later(_say_waiting, kind)


def _later(act: Callable[[str], None], kind: str) -> None:
    timer = threading.Timer(REPEATS_EVERY, act, [kind])
    timer.daemon = True
    timer.start()


def bug(what: str, error: BaseException) -> None:
    """Report an exception that only a fault of ours explains: with its traceback."""
    logger.error(f"a fault in penstock: {what}", exc_info=error)


def banner(
    ready: Ready, *, model: str, url: str, seconds: float, demo: bool = False, keyed: bool = False
) -> list[str]:
    """What the server says once it can answer, `seconds` after the command: at most seven lines.

    The last two can be pasted into a shell as they are.
    """
    state = f" + {ready.state_bytes / 1e6:,.1f} MB a sequence" if ready.state_bytes else ""
    said = [
        f"ready in {seconds:.1f} s: {model} on {ready.backend} ({ready.device}), {ready.batch_mode} batches, "
        f"context {ready.context_length:,} tokens, weights {gigabytes(ready.weights_bytes)}, "
        f"KV {ready.kv_bytes_per_token / 1e3:,.1f} KB a token{state}",
    ]
    if ready.ceiling:
        said.append(
            f"memory {gigabytes(ready.ceiling)} ({ready.decided_by}): "
            f"{gigabytes(ready.ceiling - ready.weights_bytes)} beside the weights, "
            f"longest prompt {ready.max_model_len:,} tokens"
        )
    if demo:
        said.append(BANNER)
    return [*said, f"serving {url}/v1", *pasteable(url, keyed=keyed)]


def say(lines: Iterable[str]) -> None:
    """Lines of the start's end; commands stand bare."""
    for text in lines:
        logger.info(text, extra={"bare": text.startswith(("curl", "python"))})


def base_url(host: str, port: int) -> str:
    """The URL under which a client on this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1" if host != "::" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def pasteable(url: str, *, keyed: bool) -> list[str]:
    """A curl line and a Python line that talk to the server at `url`, with nothing but what a shell has."""
    key = ' -H "Authorization: Bearer $PENSTOCK_API_KEY"' if keyed else ""
    header = ", 'Authorization': 'Bearer ' + os.environ['PENSTOCK_API_KEY']" if keyed else ""
    body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    return [
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        f'python3 -c "import json, os, urllib.request as u; '
        f"r = u.Request('{url}/v1/chat/completions', json.dumps({body.replace(chr(34), chr(39))}).encode(), "
        f"{{'Content-Type': 'application/json'{header}}}); "
        "print(json.load(u.urlopen(r))['choices'][0]['message']['content'])\"",
    ]
