"""The application called as a function: no socket, a loop of its own, an engine that says what it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.support.fake_backend import EOS_ID, FakeBackend, Run, text_parts

from penstock.api.admission import Admission
from penstock.api.app import create_app
from penstock.api.service import Service
from penstock.config import Options

PATIENCE = 60.0
"""Seconds after which a request counts as one that hangs."""


class Application:
    """One application for many requests; `says` are the ids that every choice of the next answer holds."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.says: Sequence[int] = ()
        self.backend = FakeBackend(self._script)
        self.service = Service(
            backend=self.backend,
            model_name="model",
            served_names=["model"],
            pool=ThreadPoolExecutor(1),
            admission=Admission(1_000_000_000),
        )
        self.service.set_text(text_parts())
        self.app = create_app(self.service, Options())

    async def _script(self, run: Run) -> None:
        run.ticket.put_progress(0, 1, len(run.job.prompt))
        for choice in range(run.job.n):
            most = len(self.says) if run.job.max_tokens is None else run.job.max_tokens
            for at in range(0, min(most, len(self.says)), 3):
                if choice in run.ended:
                    break
                run.put(choice, list(self.says[at : min(at + 3, most)]))
                await asyncio.sleep(0)
            if choice not in run.ended:
                run.put(choice, [EOS_ID])
                run.ended[choice] = None
                run.ticket.put_finished(choice, "length" if most < len(self.says) else "stop", 0)

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. Raises TimeoutError; AssertionError where something is left open."""
        status, answer = self.loop.run_until_complete(asyncio.wait_for(self._post(path, body), PATIENCE))
        assert self.service.admission.held == self.service.admission.open == 0
        assert all(run.ticket.closed for run in self.backend.runs)
        self.backend.runs.clear()
        return status, answer

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []
        parts = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            return parts.pop() if parts else await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"",
                 "server": ("127.0.0.1", 80), "http_version": "1.1", "scheme": "http"}  # fmt: skip
        await self.app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def check_answer(path: str, status: int, answer: bytes) -> None:
    """A 4xx in the API's shape, or an answer that is whole: nothing else may come of a client's bytes."""
    assert status == 200 or 400 <= status < 500, (status, answer[:500])
    anthropic = path.startswith("/v1/messages")
    if not answer.startswith((b"data: ", b"event: ", b": ")):
        body = json.loads(answer)
        if status != 200:
            assert body["error"]["message"]
            assert (body.get("type") == "error") == anthropic
        else:
            _check_calls(body)
        return
    events = [line[6:] for line in answer.decode().split("\n") if line.startswith("data: ")]
    typed = anthropic or path == "/v1/responses"
    last = "[DONE]" if typed else events.pop()
    parsed = [json.loads(event) for event in events]
    assert last == "[DONE]"
    assert not [event for event in parsed if "error" in event], parsed[-1]
    if typed:
        assert parsed[-1]["type"] in ("message_stop", "response.completed", "response.incomplete")
        _check_calls(parsed[-1].get("response", {}))


def _check_calls(body: dict[str, Any]) -> None:
    for item in body.get("output", ()):
        if item["type"] == "function_call":
            assert isinstance(json.loads(item["arguments"]), dict)
    for choice in body.get("choices", ()):
        for call in choice.get("message", {}).get("tool_calls", ()):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
