"""Plays a profile against a server that speaks OpenAI's chat API, and writes down what came of each request.

Every session is a client of its own: it sends its whole history each time, with the server's own answers in
it, waits for the answer, pauses, goes on. It hangs up and comes back as the profile says, and like agents do
it obeys `Retry-After`. Refuses nothing: whatever the server does is a record.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from penstock.traffic.http import Answer, Broken, Head, post
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

    async def play(self, events: Sequence[Event]) -> list[Record]:
        """All sessions at once; their records in the order in which requests ended."""
        sessions: dict[int, list[Event]] = {}
        for event in events:
            sessions.setdefault(event.session, []).append(event)
        await asyncio.gather(*(self._session(own) for own in sessions.values()))
        return self.records

    async def fit_words(self) -> None:
        """Ask once what this server counts for known texts: a template's tokens cancel out."""
        counts = []
        for count in (PROBE_WORDS, 2 * PROBE_WORDS):
            message = {"role": "user", "content": words(SYSTEM, count)}
            record = await self._request(Event(-1, 0, 0.0, 0, 0, 0, 1), [message], False)
            if record.error is not None:
                return
            counts.append(record.prompt_tokens)
        if counts[1] > counts[0]:
            self.words_per_token = PROBE_WORDS / (counts[1] - counts[0])

    async def _session(self, events: list[Event]) -> None:
        system = words(SYSTEM, self._words(events[0].shared))
        messages = [{"role": "system", "content": system}]
        for event in events:
            await asyncio.sleep(event.pause)
            messages.append({"role": "user", "content": words(event.block, self._words(event.new))})
            record = await self._until_taken(event, messages, leaves=True, stream=True)
            if record.left and event.back_after is not None:
                await asyncio.sleep(event.back_after)
                record = await self._until_taken(event, messages, leaves=False, stream=event.back_streams)
            messages.append({"role": "assistant", "content": record.text})

    async def _until_taken(
        self, event: Event, messages: list[dict[str, str]], *, leaves: bool, stream: bool
    ) -> Record:
        """Send it, again as long as the server is busy."""
        record = Record(event.session, event.turn)
        for attempt in range(BUSY_TRIES):
            record = await self._request(event, messages, stream, leaves=leaves)
            record.again = not leaves or attempt > 0
            self.records.append(record)
            if record.retry_after is None:
                break
            await asyncio.sleep(record.retry_after)
        return record

    async def _request(
        self, event: Event, messages: list[dict[str, str]], stream: bool, *, leaves: bool = False
    ) -> Record:
        record = Record(event.session, event.turn)
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": event.answer,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        began = time.monotonic()
        patience = self.timeout
        if leaves and event.leave_in_prefill is not None:
            size = sum(len(message["content"]) / 3 for message in messages) / self.words_per_token
            patience = event.leave_in_prefill * size * self._seconds_per_token
        answer = post(self.url + "/chat/completions", body, headers)
        try:
            async with asyncio.timeout(patience):
                await self._take(answer, record, event, began, leaves, stream)
        except TimeoutError:
            record.left = patience < self.timeout
            record.error = None if record.left else "timeout"
        except (OSError, Broken) as error:
            record.error = "refused" if isinstance(error, ConnectionRefusedError) else "broken"
        finally:
            await answer.aclose()
        record.total = time.monotonic() - began
        if record.first is not None and record.prompt_tokens:
            seen = record.first / record.prompt_tokens
            self._seconds_per_token = (self._seconds_per_token + seen) / 2
        return record

    async def _take(
        self, answer: Answer, record: Record, event: Event, began: float, leaves: bool, stream: bool
    ) -> None:
        head = await anext(answer)
        assert isinstance(head, Head)
        record.status = head.status
        if head.status != 200 or not stream:
            _whole(b"".join([piece async for piece in answer if isinstance(piece, bytes)]), head, record)
            return
        last, finished = began, False
        async for data in _events(answer):
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
                finished |= choice.get("finish_reason") is not None
            done = 0 if record.first is None else len(record.gaps) + 1
            if leaves and (
                (event.leave_in_prefill is not None and done)
                or (event.leave_after is not None and done >= event.leave_after)
            ):
                record.left = True
                return
        if not finished:
            record.error = "incomplete"

    def _words(self, tokens: int) -> int:
        return round(tokens * self.words_per_token)


async def _events(answer: Answer) -> AsyncIterator[dict[str, Any]]:
    """The JSON payloads of a server-sent event stream; comments and [DONE] left out."""
    held = b""
    async for piece in answer:
        *lines, held = (held + cast(bytes, piece)).split(b"\n")
        for line in lines:
            payload = line.removeprefix(b"data:").strip()
            if line.startswith(b"data:") and payload != b"[DONE]":
                yield json.loads(payload)


def _whole(body: bytes, head: Head, record: Record) -> None:
    """Take in an answer that is no stream."""
    try:
        data = json.loads(body)
    except ValueError:
        data = {}
    data = data if isinstance(data, dict) else {}
    if head.status == 200 and data.get("choices"):
        record.text = (data["choices"][0].get("message") or {}).get("content") or ""
        _usage(data, record)
        return
    error = data.get("error")
    code = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    record.error = f"{head.status} {code}" if code else str(head.status)
    waits = head.headers.get("retry-after", "")
    record.retry_after = min(60.0, float(waits)) if waits.isdigit() else None


def _usage(data: dict[str, Any], record: Record) -> None:
    if usage := data.get("usage"):
        record.prompt_tokens = usage.get("prompt_tokens") or 0
        record.answer_tokens = usage.get("completion_tokens") or 0
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
