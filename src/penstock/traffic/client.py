"""Plays a profile against a server that speaks OpenAI's chat API, and writes down what came of each request.

Every session is a client of its own, in its own thread: it sends its whole history each time, with the
server's own answers in it, waits for the answer, pauses, goes on. It hangs up and comes back as the profile
says, and like agents do it obeys `Retry-After`. Refuses nothing: whatever the server does is a record.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from itertools import groupby
from operator import attrgetter
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from penstock.traffic.profiles import SYSTEM, Event, words

BUSY_TRIES = 20
FIRST_GUESS = 0.002
"""Seconds a prompt token is expected to take before any was seen: when to hang up in the first prefill."""
PROBE_WORDS = 200


@dataclass(slots=True)
class Record:
    """What came of one request. Times in seconds from its start; `error` None: a whole answer, or left."""

    session: int
    turn: int
    again: bool = False
    status: int = 0
    error: str | None = None
    left: bool = False
    first: float | None = None
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    retry_after: float | None = None
    """Seconds, where the server asks to come back."""
    text: str = ""


@dataclass(slots=True)
class Player:
    """One run against one server. `url` ends before /chat/completions."""

    url: str
    model: str
    key: str | None = None
    timeout: float = 3600.0
    words_per_token: float = 1.0
    records: list[Record] = field(default_factory=list)
    _seconds_per_token: float = FIRST_GUESS

    def play(self, events: Sequence[Event]) -> list[Record]:
        """All sessions at once; their records in the order in which requests ended."""
        own = attrgetter("session")
        sessions = [list(group) for _, group in groupby(sorted(events, key=own), own)]
        # Daemons: who interrupts the run doesn't wait for answers.
        threads = [Thread(target=self._session, args=(session,), daemon=True) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.records

    def fit_words(self) -> None:
        """Ask once what this server counts for known texts: a template's tokens cancel out."""
        counts = []
        for count in (PROBE_WORDS, 2 * PROBE_WORDS):
            message = {"role": "user", "content": words(SYSTEM, count)}
            record = self._request(Event(-1, 0, 0.0, 0, 0, 0, 1), [message], stream=False)
            if record.error is not None:
                return
            counts.append(record.prompt_tokens)
        if counts[1] > counts[0]:
            self.words_per_token = PROBE_WORDS / (counts[1] - counts[0])

    def _session(self, events: list[Event]) -> None:
        system = words(SYSTEM, self._words(events[0].shared))
        messages = [{"role": "system", "content": system}]
        for event in events:
            time.sleep(event.pause)
            messages.append({"role": "user", "content": words(event.block, self._words(event.new))})
            record = self._until_taken(event, messages)
            if record.left and event.back_after is not None:
                time.sleep(event.back_after)
                patient = replace(event, leave_in_prefill=None, leave_after=None)
                record = self._until_taken(patient, messages, again=True, stream=event.back_streams)
            messages.append({"role": "assistant", "content": record.text})

    def _until_taken(
        self, event: Event, messages: list[dict[str, str]], *, again: bool = False, stream: bool = True
    ) -> Record:
        """Send it, again as long as the server is busy."""
        for attempt in range(BUSY_TRIES):
            record = self._request(event, messages, stream=stream)
            record.again = again or attempt > 0
            self.records.append(record)
            if record.retry_after is None:
                break
            time.sleep(record.retry_after)
        return record

    def _request(self, event: Event, messages: list[dict[str, str]], *, stream: bool) -> Record:
        record = Record(event.session, event.turn)
        body = {"model": self.model, "messages": messages, "max_tokens": event.answer, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        patience = self.timeout
        if event.leave_in_prefill is not None:
            size = sum(len(message["content"]) / 3 for message in messages) / self.words_per_token
            patience = event.leave_in_prefill * size * self._seconds_per_token
        address = urlsplit(self.url)
        kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        began = time.monotonic()
        try:
            with closing(kind(address.netloc, timeout=patience)) as connection:
                connection.request("POST", address.path + "/chat/completions", json.dumps(body), headers)
                peer = connection.sock  # the connection forgets it where the answer's end closes it
                with connection.getresponse() as response:
                    record.status = response.status
                    if response.status == 200 and stream:
                        _read_stream(_events(response, peer, began + patience), record, event, began)
                    else:
                        _read_whole(response, record)
        except TimeoutError:
            record.left = patience < self.timeout
            record.error = None if record.left else "timeout"
        except ConnectionRefusedError:
            record.error = "refused"
        except Exception:  # a connection that ends early, or what is no answer
            record.error = "broken"
        record.total = time.monotonic() - began
        if record.first is not None and record.prompt_tokens:
            seen = record.first / record.prompt_tokens
            self._seconds_per_token = (self._seconds_per_token + seen) / 2
        return record

    def _words(self, tokens: int) -> int:
        return round(tokens * self.words_per_token)


def _events(response: HTTPResponse, peer: socket.socket, deadline: float) -> Iterator[dict[str, Any]]:
    """The JSON payloads of a server-sent event stream; comments and [DONE] left out. Raises TimeoutError."""
    held = b""
    while (left := deadline - time.monotonic()) > 0:
        peer.settimeout(left)
        if not (piece := response.read1()):
            return
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            payload = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and payload != b"[DONE]":
                yield json.loads(payload)
    raise TimeoutError


def _read_stream(events: Iterable[dict[str, Any]], record: Record, event: Event, began: float) -> None:
    """Take in a stream, up to where the profile's client hangs up."""
    last, done, finished = began, 0, False
    for data in events:
        if data.get("error"):
            record.error = f"stream: {data['error'].get('code') or 'error'}"
            return
        _usage(data, record)
        for choice in data.get("choices", ()):
            delta = choice.get("delta") or {}
            if piece := delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content"):
                now = time.monotonic()
                if record.first is None:
                    record.first = now - began
                else:
                    record.gaps.append(now - last)
                last = now
                record.text += piece
                done += 1
            finished |= choice.get("finish_reason") is not None
        most = event.leave_after if event.leave_in_prefill is None else 1
        if most is not None and done >= most:
            record.left = True
            return
    if not finished:
        record.error = "incomplete"


def _read_whole(response: HTTPResponse, record: Record) -> None:
    """Take in an answer that is no stream."""
    try:
        data = json.loads(response.read())
    except ValueError:
        data = {}
    data = data if isinstance(data, dict) else {}
    if response.status == 200 and data.get("choices"):
        record.text = (data["choices"][0].get("message") or {}).get("content") or ""
        _usage(data, record)
        return
    error = data.get("error")
    code = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    record.error = f"{response.status} {code}" if code else str(response.status)
    waits = response.headers.get("retry-after", "")
    record.retry_after = min(60.0, float(waits)) if waits.isdigit() else None


def _usage(data: dict[str, Any], record: Record) -> None:
    if usage := data.get("usage"):
        record.prompt_tokens = usage.get("prompt_tokens") or 0
        record.answer_tokens = usage.get("completion_tokens") or 0
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
