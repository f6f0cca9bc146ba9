"""Plays a profile against a server that speaks OpenAI's API, and writes down what came of each request.

Every session is a client of its own, in its own thread: it sends its whole history each time, with the
server's own answers in it, waits for the answer, pauses, goes on. It hangs up and comes back as the profile
says, and like agents do it obeys `Retry-After`. Whatever the server does to a request is a record; only a
server that cannot be asked at all is a ServerProblem.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from itertools import groupby
from operator import attrgetter
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from penstock.traffic.profiles import Event, Piece, words

BUSY_TRIES = 20
FIRST_GUESS = 0.002
"""Seconds a prompt token is expected to take before any was seen: when to hang up in the first prefill."""
PROBE_WORDS = 200
Message = dict[str, str]


class ServerProblem(Exception):
    """The server cannot be measured. One sentence says why, and what to do."""


@dataclass(slots=True)
class Record:
    """What came of one request. Times in seconds from its start; `error` None: a whole answer, or left."""

    session: int
    turn: int
    kind: str = "chat"
    at: float = 0.0
    """When it was sent, from the start of the run."""
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
    on_record: Callable[[Record], object] = lambda record: None
    """Called with each record, in the threads of the sessions."""
    records: list[Record] = field(default_factory=list)
    _seconds_per_token: float = FIRST_GUESS
    _began: float = 0.0

    def play(self, events: Sequence[Event]) -> list[Record]:
        """All sessions at once; their records in the order in which requests ended."""
        own = attrgetter("session")
        sessions = [list(group) for _, group in groupby(sorted(events, key=own), own)]
        threads = []
        self._began = time.monotonic()
        for session in sorted(sessions, key=lambda session: session[0].pause):
            time.sleep(max(0.0, self._began + session[0].pause - time.monotonic()))
            # Daemons: who interrupts the run doesn't wait for answers.
            threads.append(Thread(target=self._session, args=(session,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return self.records

    def fit_words(self) -> None:
        """Ask once what this server counts for known texts: a template's tokens cancel out."""
        counts = []
        for count in (PROBE_WORDS, 2 * PROBE_WORDS):
            message = {"role": "user", "content": words("probe", count)}
            record = self._request(Event(-1, 0, 0.0, (), (), 1), [message], stream=False)
            if record.error is not None:
                return
            counts.append(record.prompt_tokens)
        if counts[1] > counts[0]:
            self.words_per_token = PROBE_WORDS / (counts[1] - counts[0])

    def _session(self, events: list[Event]) -> None:
        system = events[0].system
        messages = [{"role": "system", "content": self._text(system)}] if system else []
        stripped = 0  # messages whose answers have lost their first half
        for event in events:
            time.sleep(event.pause if event.turn else 0.0)
            if event.strip:
                messages[stripped:] = map(_stripped, messages[stripped:])
                stripped = len(messages)
            if event.summary:
                messages[1:] = [{"role": "user", "content": self._text(event.summary)}, *messages[-2:]]
                stripped = min(stripped, len(messages))
            if event.kind != "chat":
                messages = []
            messages.append({"role": "user", "content": self._text(event.text)})
            record = self._until_taken(event, messages, stream=event.kind != "count")
            if record.left and event.back_after is not None:
                time.sleep(event.back_after)
                patient = replace(event, leave_in_prefill=None, leave_after=None, leave_at=None)
                record = self._until_taken(patient, messages, again=True, stream=event.back_streams)
            messages.append({"role": "assistant", "content": record.text})

    def _until_taken(
        self, event: Event, messages: list[Message], *, again: bool = False, stream: bool = True
    ) -> Record:
        """Send it, again as long as the server is busy."""
        for attempt in range(BUSY_TRIES):
            record = self._request(event, messages, stream=stream)
            record.again = again or attempt > 0
            self.records.append(record)
            self.on_record(record)
            if record.retry_after is None:
                break
            time.sleep(record.retry_after)
        return record

    def _request(self, event: Event, messages: list[Message], *, stream: bool) -> Record:
        patience = self.timeout if event.leave_at is None else event.leave_at
        if event.leave_in_prefill is not None:
            size = sum(len(message["content"]) / 3 for message in messages) / self.words_per_token
            patience = event.leave_in_prefill * size * self._seconds_per_token
        began = time.monotonic()
        record = Record(event.session, event.turn, event.kind, began - self._began)
        path, body = _asked(event, messages, stream)
        try:
            with closing(_connection(self.url, patience)) as connection:
                address = urlsplit(self.url).path + path
                connection.request(
                    "POST", address, json.dumps({"model": self.model, **body}), _headers(self.key)
                )
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

    def _text(self, pieces: Iterable[Piece]) -> str:
        return " ".join(words(block, round(tokens * self.words_per_token)) for block, tokens in pieces)


def get(url: str, path: str, key: str | None, patience: float = 10.0) -> tuple[int, Any]:
    """Status of GET, and the body if that is JSON, else {}. Raises ServerProblem."""
    try:
        with closing(_connection(url, patience)) as connection:
            connection.request("GET", urlsplit(url).path + path, headers=_headers(key))
            answer = connection.getresponse()
            body = answer.read()
    except (OSError, HTTPException) as error:
        reason = getattr(error, "strerror", None) or "it does not answer"
        raise ServerProblem(f"{url} cannot be reached ({reason}): is the server running?") from None
    with suppress(ValueError):
        return answer.status, json.loads(body)
    return answer.status, {}


def served_model(url: str, key: str | None) -> str | None:
    """The first model that the server at `url` lists; None where it lists none. Raises ServerProblem."""
    status, body = get(url, "/models", key)
    if status in (401, 403):
        raise ServerProblem(f"{url} asks for a key: set OPENAI_API_KEY to it.")
    with suppress(LookupError, TypeError):
        return str(body["data"][0]["id"])
    return None


def _connection(url: str, patience: float) -> HTTPConnection:
    address = urlsplit(url)
    kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
    return kind(address.netloc, timeout=patience)


def _headers(key: str | None) -> dict[str, str]:
    bearer = {"Authorization": f"Bearer {key}"} if key else {}
    return {"Content-Type": "application/json", **bearer}


def _asked(event: Event, messages: list[Message], stream: bool) -> tuple[str, dict[str, Any]]:
    """The path below the URL, and the body but for the model."""
    if event.kind == "count":
        return "/messages/count_tokens", {"messages": messages}
    body: dict[str, Any] = {"max_tokens": event.answer, "temperature": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if event.kind == "fim":
        return "/completions", {"prompt": messages[-1]["content"], **body}
    return "/chat/completions", {"messages": messages, **body}


def _stripped(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": content[len(content) // 2 :]} if message["role"] == "assistant" else message


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
            said = (delta.get(name) for name in ("content", "reasoning", "reasoning_content"))
            if piece := next(filter(None, said), choice.get("text")):
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
    if response.status == 200 and "input_tokens" in data:
        record.prompt_tokens = data["input_tokens"]
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
