from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import log, wire


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    yield from set_up(io.StringIO(), monkeypatch)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    yield from set_up(Terminal(), monkeypatch)


def set_up(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    loggers = [logging.getLogger(name) for name in ("", "penstock", "asyncio", "uvicorn.error")]
    before = [(each, list(each.handlers), each.level, each.propagate) for each in loggers]
    for name in log._ADVICE_OFF:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log, "_pace", log.PrefillPace())
    with warnings.catch_warnings():
        log.setup("INFO", stream)
        yield stream
    for each, handlers, level, propagate in before:
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)


def untimed(text: str) -> list[str]:
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]


def test_a_request_is_one_line(stream: io.StringIO) -> None:
    log.request_done(
        log.RequestRecord(id="3f2", prompt=1234, prefill=1.23, generated=87, decode=87 / 45.2, finish="stop")
    )
    assert untimed(stream.getvalue()) == [
        "req 3f2: prompt 1,234 = 0 cached + 1,234 new, queue 0.0 s, prefill 1.2 s, "
        "87 tokens at 45.2 tok/s, stop"
    ]


def test_one_token_has_no_rate() -> None:
    record = log.RequestRecord(id="1", prompt=5, cached=4, generated=1, decode=0.0, finish="length")
    assert record.line().endswith("= 4 cached + 1 new, queue 0.0 s, prefill 0.0 s, 1 tokens, length")


def test_a_client_that_left_is_one_quiet_line(stream: io.StringIO) -> None:
    log.request_cancelled("3f2", 12)
    assert untimed(stream.getvalue()) == ["req 3f2: client gone after 12 tokens"]


def test_probes_are_for_debugging_only(stream: io.StringIO) -> None:
    log.probe("GET", "/health", 200)
    assert stream.getvalue() == ""
    log.setup("DEBUG", stream)
    log.probe("GET", "/health", 200)
    assert untimed(stream.getvalue()) == ["GET /health: 200"]


def test_as_json_each_line_is_an_object_with_the_figures_as_fields(terminal: io.StringIO) -> None:
    log.setup("INFO", terminal, "json")
    log.start_line("listening")
    record = log.RequestRecord(id="3f2", prompt=1234, cached=34, why="evicted", generated=87, decode=1.5)
    log.request_done(record)
    log.request_cancelled("3f3", 12)
    log.request_failed("3f4", "busy", "The server is busy, retry.")
    for done in (100, 600):
        log.logger.info("a bar", extra={"redrawn": True, "done": done})
    try:
        raise KeyError("k")
    except KeyError as error:
        log.bug("a test", error)
    lines = [json.loads(line) for line in terminal.getvalue().splitlines()]
    assert [line["message"].split()[0] for line in lines] == ["listening", "req", "req", "req", "a", "a", "a"]
    assert [line["level"] for line in lines] == ["info"] * 3 + ["warning"] + ["info"] * 2 + ["error"]
    assert lines[1]["request"] == dataclasses.asdict(record)
    assert lines[1]["message"] == record.line()
    assert lines[2]["request"] == {"id": "3f3", "generated": 12, "finish": "client gone"}
    assert lines[3]["request"] == {"id": "3f4", "finish": "error", "kind": "busy"}
    assert lines[6]["traceback"].endswith("KeyError: 'k'")
    assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)


def test_libraries_say_nothing(stream: io.StringIO, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("transformers").error("advice")
    logging.getLogger("uvicorn.access").error("GET /")
    logging.getLogger("asyncio").warning("slow callback")
    warnings.warn("deprecated", stacklevel=1)
    assert stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_our_own_faults_come_with_a_traceback(stream: io.StringIO) -> None:
    try:
        raise KeyError("k")
    except KeyError as error:
        log.bug("a test", error)
    assert "error: a fault in penstock: a test\nTraceback" in stream.getvalue()


def test_progress_begins_after_five_seconds_and_comes_every_five() -> None:
    pace = log.PrefillPace()
    said = {now: pace.note("3f2", done=now * 1000, total=64_523, now=now) for now in range(23)}
    assert [now for now, line in said.items() if line] == [5, 10, 15, 20]
    assert said[20] == "req 3f2: prefill 20,000/64,523, 30 %, ~45 s left"


def test_what_is_left_goes_by_the_last_seconds_and_not_by_what_was_lost_before() -> None:
    pace = log.PrefillPace()
    said = [pace.note("1", done, 60_000, now) for now, done in enumerate(range(10_000, 52_000, 7_000))]
    assert said[-1] == "req 1: prefill 45,000/60,000, 75 %, ~2 s left"
    assert pace.note("1", 11_000, 60_000, 10.0) == "req 1: prefill 11,000/60,000, 18 %", "its step failed"
    assert pace.note("1", 36_000, 60_000, 15.0) == "req 1: prefill 36,000/60,000, 60 %, ~5 s left"


def test_a_prefill_that_is_done_or_gone_starts_afresh() -> None:
    pace = log.PrefillPace()
    pace.note("1", 0, 100, 0.0)
    assert pace.note("1", 100, 100, 50.0) is None
    assert pace.note("1", 0, 100, 60.0) is None
    pace.forget("1")
    assert pace.note("1", 0, 100, 70.0) is None
    assert pace._open.keys() == {"1"}
    pace.forget("1")
    assert not pace._open


def test_stalled_progress_has_no_estimate() -> None:
    pace = log.PrefillPace()
    pace.note("1", 7, 100, 0.0)
    assert pace.note("1", 7, 100, 6.0) == "req 1: prefill 7/100, 7 %"


def test_progress_is_redrawn_on_a_terminal_and_never_mixes_with_a_line(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now in (0.0, 5.0, 10.0):
        monkeypatch.setattr(log, "_clock", lambda now=now: now)
        log.progress("1", int(now) * 10 + 1, 1000)
    log.start_line("something else")
    written = terminal.getvalue()
    assert written.count("\n") == 1
    assert written.count("\r\x1b[K") == 2
    last = written.rpartition("\r\x1b[K")[2]
    assert untimed(last) == ["something else"]


def test_progress_is_lines_in_a_file(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for now in (0.0, 5.0, 10.0):
        monkeypatch.setattr(log, "_clock", lambda now=now: now)
        log.progress("1", int(now) * 10 + 1, 1000)
    assert len(stream.getvalue().splitlines()) == 2
    assert "\r" not in stream.getvalue()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 700)), max_size=60))
def test_repeated_events_are_summed_and_none_is_lost(events: list[tuple[str, int]]) -> None:
    """On a clock of its own: timers are what is due a second (1,024 ticks) later."""
    now, timers, said = 0, [], []

    def pass_time(until: int) -> None:
        nonlocal now
        while timers and timers[0][0] <= until:
            now, act, kind = timers.pop(0)
            act(kind)
        now = until

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "_waiting", {})
        patch.setattr(log, "_later", lambda act, kind: timers.append((now + 1024, act, kind)))
        patch.setattr(log.logger, "warning", lambda line: said.append((line[0], now, line)))
        for kind, pause in events:
            pass_time(now + pause)
            log.repeated(kind, f"{kind}!")
        pass_time(now + 5000)
        assert not log._waiting
    assert not timers
    for kind in "ab":
        times = [at for k, at, _ in said if k == kind]
        assert all(later - earlier >= 1024 for earlier, later in pairwise(times))
        more = sum(
            int(m[1]) for k, _, line in said if k == kind and (m := re.search(r"and (\d+) more", line))
        )
        assert len(times) + more == sum(1 for k, _ in events if k == kind)


def test_what_was_held_back_is_said_without_another_event(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Timer] = []

    class Held(threading.Timer):
        def start(self) -> None:
            started.append(self)

    monkeypatch.setattr(log, "_waiting", {})
    monkeypatch.setattr(threading, "Timer", Held)
    for _ in range(4):
        log.repeated("busy", "busy: a request was turned away")
    (timer,) = started
    assert timer.daemon
    assert timer.interval == 1.0
    timer.function(*timer.args)
    assert untimed(stream.getvalue()) == [
        "warning: busy: a request was turned away",
        "warning: busy: a request was turned away (and 2 more like it)",
    ]


def test_a_stderr_that_nobody_reads_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "w") as pipe:
        for _ in set_up(pipe, monkeypatch):  # type: ignore[arg-type]
            for number in range(3_000):
                logging.getLogger("penstock").error("line %d of what fills a pipe of 64 KB", number)


def test_a_lost_stderr_is_no_error(stream: io.StringIO) -> None:
    stream.close()
    log.start_line("nobody hears this")


READY = wire.Ready(
    model_type="demo",
    backend="cpu",
    device="x86_64",
    batch_mode="ragged",
    batch_reason="",
    context_length=8192,
    eos_ids=[],
    vocab_size=1,
    weights_bytes=8_000_000,
    kv_bytes_per_token=4096,
    state_bytes=1_250_000,
    versions={},
    ceiling=23_100_000_000,
    decided_by="physical memory",
)


def test_the_banner_tells_what_is_served_in_few_lines(stream: io.StringIO) -> None:
    lines = log.banner(READY, model="demo", url="http://127.0.0.1:8080", seconds=1.23, demo=True)
    assert lines[0] == (
        "ready in 1.2 s: demo on cpu (x86_64), ragged batches, context 8,192 tokens, weights 8.0 MB, "
        "KV 4.1 KB a token + 1.2 MB a sequence"
    )
    assert "demo model: 4M parameters, for trying the server, not for answers" in lines
    assert "serving http://127.0.0.1:8080/v1" in lines
    assert (
        "memory 23.1 GB (physical memory): 23.1 GB beside the weights, longest prompt 8,192 tokens" in lines
    )
    assert len(lines) <= 7
    log.say(lines)
    assert stream.getvalue().splitlines()[-2:] == lines[-2:]


def test_addresses_are_ones_that_a_client_can_use() -> None:
    assert log.base_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert log.base_url("::", 1) == "http://[::1]:1"
    assert log.base_url("::1", 1) == "http://[::1]:1"
    assert log.base_url("mac.local", 1) == "http://mac.local:1"


class Answering(BaseHTTPRequestHandler):
    seen: list[tuple[str | None, str | None, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).seen.append((self.headers["Content-Type"], self.headers["Authorization"], body))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": [{"message": {"content": "Hi there"}}]}')

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("keyed", [False, True])
def test_the_pasteable_lines_work_in_a_shell(keyed: bool, tmp_path: Path) -> None:
    Answering.seen = []
    server = HTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        for line in log.pasteable(f"http://127.0.0.1:{server.server_port}", keyed=keyed):
            if shlex.split(line)[0] == "python3":
                line = line.replace("python3", shlex.quote(sys.executable), 1)  # noqa: PLW2901
            env = {"PATH": "/usr/bin:/bin", "PENSTOCK_API_KEY": "key"}
            done = subprocess.run(line, shell=True, capture_output=True, text=True, env=env, check=True)
            assert "Hi there" in done.stdout
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    key = "Bearer key" if keyed else None
    body = b'{"messages": [{"role": "user", "content": "Hello"}]}'
    assert Answering.seen == [("application/json", key, body)] * 2
