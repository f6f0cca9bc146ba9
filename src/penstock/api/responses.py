"""/v1/responses: OpenAI's Responses API over the same path as chat.

A request becomes a chat request (`responses_request.as_chat`); here is how the answer is worded: items that
open and close, one at a time, and events with a running number. Invariant: the answer without streaming is
what the last event of the stream says.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from penstock.api import chat, params, responses_request
from penstock.api.exchange import Exchange
from penstock.api.generation import Piece, Plan
from penstock.api.renderer import Renderer, encode
from penstock.api.responses_request import PLAIN, Json, ResponsesRequest
from penstock.api.service import Service
from penstock.api.sse import respond
from penstock.errors import PenstockError
from penstock.text.tools import ToolCall

_MESSAGE, _REASONING = "output_text", "reasoning_text"
_BEGUN: dict[str, tuple[str, Json, Json]] = {
    _MESSAGE: ("msg", {"type": "message", "role": "assistant"}, {"annotations": [], "logprobs": []}),
    _REASONING: ("rs", {"type": "reasoning", "summary": []}, {}),
}
"""Kind of text → prefix of the item's id, what else the item holds, what else its part holds."""
_MORE: dict[str, Json] = {_MESSAGE: {"logprobs": []}, _REASONING: {}}
"""What else the events hold that bring text."""


async def create(service: Service, exchange: Exchange) -> None:
    """POST /v1/responses."""
    await respond(service, exchange, ResponsesRequest, prepare, ResponsesRenderer)


async def prepare(service: Service, raw: Json, request: ResponsesRequest) -> Plan:
    """Everything up to the ids. Raises PenstockError for what can be refused."""
    convert, loop = responses_request.as_chat, asyncio.get_running_loop()
    try:
        asked = await loop.run_in_executor(service.pool, convert, raw, request)
        plan = await chat.prepare(service, *asked, stream_calls=False)
    except PenstockError as error:
        raise params.flattened(error, responses_request.own_names(request)) from None
    echo = responses_request.echo(raw, request)
    return replace(plan, echo=echo, retained=plan.retained + len(encode(echo.fields)) * 4)


class ResponsesRenderer(Renderer):
    """Events of OpenAI's Responses."""

    def __init__(self, id: str, model: str, plan: Plan) -> None:
        super().__init__(1)
        self._id, self._names, self._encrypted = id, plan.echo.names, plan.echo.encrypted
        sampling = plan.jobs[0].sampling
        begun = {"object": "response", "created_at": int(time.time()), "status": "in_progress", "output": []}
        fixed: Json = {"store": False, "background": False, "truncation": "disabled"}
        fixed |= {"service_tier": "default", "top_logprobs": 0}
        fixed |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "completed_at": None}
        fixed |= dict.fromkeys(("error", "incomplete_details", "previous_response_id", "usage"))
        about = {"model": model, "temperature": sampling.temperature, "top_p": sampling.top_p}
        self._response: Json = {"id": f"resp_{id}", **begun, **fixed, **about, **plan.echo.fields}
        self._number = 0
        self._output: list[Json] = []
        self._open = ""
        self._said: list[str] = []
        self._reason: str | None = None

    def opening(self) -> bytes:
        """The response without output, twice, as OpenAI does."""
        return self._event("response.created", response=self._response) + self.keepalive()

    def keepalive(self) -> bytes:
        """The response, still without output."""
        return self._event("response.in_progress", response=self._response)

    def piece(self, piece: Piece) -> bytes:
        """Deltas in their items; a tool call is an item of its own."""
        data = b""
        for delta in piece.deltas:
            if delta.reasoning:
                data += self._say(_REASONING, delta.reasoning)
            if delta.content:
                data += self._say(_MESSAGE, delta.content)
            for call in delta.tool_calls:
                data += self._call(call)
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason
        return data

    def ending(self, usage: Json) -> bytes:
        """The last item's end, and the whole response."""
        closed = self._close(self._status())
        return closed + self._event(f"response.{self._status()}", response=self.whole(usage))

    def failure(self, error: PenstockError) -> bytes:
        """What agents act on, with the codes they know, then what the SDKs raise, with ours.

        An open item stays so: of a failed answer clients keep what is done.
        """
        told = error.openai()["error"]
        known = "server_error" if error.kind.value.status >= 500 else "invalid_prompt"
        done = [item for item in self._output if item["status"] == "completed"]
        response = {**self._response, "status": "failed", "output": done}
        response["error"] = {"code": known, "message": error.message}
        said = {name: told[name] for name in ("code", "message", "param")}
        return self._event("response.failed", response=response) + self._event("error", **said, error=told)

    def collect(self, piece: Piece) -> int:
        """The items as in a stream, whose events measure what they hold."""
        return len(self.piece(piece))

    def whole(self, usage: Json) -> Json:
        """The response at its end."""
        status = self._status()
        self._close(status)
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        at = int(time.time()) if status == "completed" else None
        ended = {"status": status, "completed_at": at, "incomplete_details": details, "output": self._output}
        return {**self._response, **ended, "usage": _usage(usage)}

    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _say(self, kind: str, text: str) -> bytes:
        data = b"" if self._open == kind else self._begin(kind)
        self._said.append(text)
        return data + self._of_item(f"{kind}.delta", content_index=0, delta=text, **_MORE[kind])

    def _begin(self, kind: str) -> bytes:
        prefix, item, _ = _BEGUN[kind]
        data = self._close("completed") + self._add(prefix, {**item, "content": []})
        self._open = kind
        self._said.clear()
        return data + self._of_item("content_part.added", content_index=0, part=self._part())

    def _close(self, status: str) -> bytes:
        """Ends the item whose text is open, if one is."""
        if not self._open:
            return b""
        kind, part, self._open = self._open, self._part(), ""
        said = {"text": part["text"], **_MORE[kind]}
        data = self._of_item(f"{kind}.done", content_index=0, **said)
        data += self._of_item("content_part.done", content_index=0, part=part)
        ended = {"content": [part]}
        if kind == _REASONING and self._encrypted:
            ended["encrypted_content"] = PLAIN + part["text"]
        return data + self._done(status, ended)

    def _call(self, call: ToolCall) -> bytes:
        space, name = self._names.get(call.name, ("", call.name))
        item = {"type": "function_call", "call_id": call.id, "name": name, "arguments": ""}
        if space:
            item["namespace"] = space
        data = self._close("completed") + self._add("fc", item)
        data += self._of_item("function_call_arguments.delta", delta=call.arguments)
        data += self._of_item("function_call_arguments.done", name=name, arguments=call.arguments)
        return data + self._done("completed", {"arguments": call.arguments})

    def _add(self, prefix: str, item: Json) -> bytes:
        at = len(self._output)
        self._output.append({"id": f"{prefix}_{self._id}_{at}", **item, "status": "in_progress"})
        return self._event("response.output_item.added", output_index=at, item=self._output[at])

    def _done(self, status: str, ended: Json) -> bytes:
        item, at = self._output[-1], len(self._output) - 1
        item.update(ended, status=status)
        return self._event("response.output_item.done", output_index=at, item=item)

    def _part(self) -> Json:
        return {"type": self._open, "text": "".join(self._said), **_BEGUN[self._open][2]}

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode(event) + b"\n\n"


def _usage(usage: Json) -> Json:
    """Chat's usage under the names of this API."""
    told = {name.replace("prompt", "input").replace("completion", "output"): usage[name] for name in usage}
    return {**told, "input_tokens_details": {**told["input_tokens_details"], "cache_write_tokens": 0}}
