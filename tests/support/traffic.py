"""Requests of many kinds over HTTP, and what came of each, in a form that two runs can be compared by."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass
class Answer:
    """All that the client was told. `broken`: what ended the answer before its end."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    broken: str | None = None


def bodies(count: int, seed: int = 0, longest: int = 8000, most: int = 48) -> list[dict[str, Any]]:
    """Streams and plain requests, greedy and sampled, n = 2, tools; every second prompt is long."""
    draw = random.Random(seed)
    made = []
    for at in range(count):
        length = draw.randrange(longest // 2, longest) if at % 2 else draw.randrange(5, 200)
        content = "".join(draw.choices("abcdefghij klmnop\n", k=length))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": draw.randrange(most // 2, most),
            "stream": at % 3 != 2,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        body |= {"temperature": 0} if at % 4 < 2 else {"temperature": 1.0, "seed": at}
        if at % 5 == 3:
            body["n"] = 2
        if at % 5 == 4:
            body["tools"] = [TOOL]
        if at % 7 == 0:
            body["logprobs"] = True
        made.append(body)
    return made


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], on_token: Callable[[], object] = lambda: None
) -> Answer:
    """One request to its end, whatever that is."""
    answer = Answer()
    try:
        if body.get("stream"):
            await _stream(client, body, answer, on_token)
        else:
            got = await client.post("/v1/chat/completions", json=body)
            if got.status_code != 200:
                answer.broken = f"{got.status_code} {got.text}"
                return answer
            _take(answer, got.json(), "message")
    except (httpx.HTTPError, ValueError) as error:
        answer.broken = f"{type(error).__name__}: {error}"
    return answer


async def _stream(
    client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, on_token: Callable[[], object]
) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            answer.broken = f"{response.status_code} {await response.aread()!r}"
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    answer.broken = str(chunk["error"])
                    return
                if _take(answer, chunk, "delta"):
                    on_token()
    answer.broken = "the stream ended without [DONE]"


def _take(answer: Answer, chunk: dict[str, Any], part: str) -> bool:
    got = False
    for choice in chunk.get("choices", []):
        text = choice[part].get("content") or ""
        got = got or bool(text)
        answer.texts[choice["index"]] = answer.texts.get(choice["index"], "") + text
        if choice.get("finish_reason"):
            assert choice["index"] not in answer.reasons, "ended twice"
            answer.reasons[choice["index"]] = choice["finish_reason"]
    if chunk.get("usage"):
        # What was cached depends on what ran before.
        answer.usage = {k: v for k, v in chunk["usage"].items() if k != "prompt_tokens_details"}
    return got


class Traffic:
    """Keeps `width` requests open, in order of `bodies` again and again, until told to stop."""

    def __init__(self, url: str, requests: list[dict[str, Any]], width: int) -> None:
        limits = httpx.Limits(max_connections=width + 4)
        self.client = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits)
        self.requests = requests
        self.width = width
        self.answers: list[tuple[int, Answer]] = []
        self.stopping = False
        self.last_token = time.monotonic()
        self.open = 0
        self.waiting: set[int] = set()
        """Streams that are open and have no token yet, by the number of their request."""
        self._next = 0

    async def run(self) -> None:
        """Until `stopping`; what is open then still ends."""
        await asyncio.gather(*(self._client() for _ in range(self.width)))
        await self.client.aclose()

    async def once(self) -> list[Answer]:
        """Every request once."""
        gate = asyncio.Semaphore(self.width)

        async def one(body: dict[str, Any]) -> Answer:
            async with gate:
                return await ask(self.client, body)

        answers = await asyncio.gather(*map(one, self.requests))
        await self.client.aclose()
        return list(answers)

    async def _client(self) -> None:
        while not self.stopping:
            number, self._next = self._next, self._next + 1
            at = number % len(self.requests)
            self.open += 1
            if self.requests[at]["stream"]:
                self.waiting.add(number)
            answer = await ask(self.client, self.requests[at], partial(self._token, number))
            self.answers.append((at, answer))
            self.waiting.discard(number)
            self.open -= 1

    def _token(self, number: int) -> None:
        self.last_token = time.monotonic()
        self.waiting.discard(number)
