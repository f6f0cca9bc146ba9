"""/v1/messages and /v1/messages/count_tokens: Anthropic's API over the same path as chat.

A request becomes a chat request (`anthropic.as_chat`); here is how the answer is worded: content blocks that
open and close, one at a time. Invariant: a stream's blocks are numbered without gaps, and each is closed.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from penstock.api import anthropic, chat, params
from penstock.api.anthropic import CountRequest, MessagesRequest
from penstock.api.exchange import Exchange
from penstock.api.generation import Piece, Plan
from penstock.api.renderer import Renderer, encode
from penstock.api.service import Service
from penstock.api.sse import respond
from penstock.api.tokens import by_the_front
from penstock.errors import PenstockError
from penstock.text.calls import CallPart
from penstock.text.parts import TextParts
from penstock.text.tools import ToolCall

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_NAMES = {"response_format": "output_config.format", "function.parameters": "function.input_schema"}


async def create(service: Service, exchange: Exchange) -> None:
    """POST /v1/messages."""
    await respond(service, exchange, MessagesRequest, prepare, MessagesRenderer)


async def prepare(service: Service, raw: dict[str, Any], request: MessagesRequest) -> Plan:
    """Everything up to the ids. Raises PenstockError for what can be refused."""
    try:
        return await chat.prepare(service, *anthropic.as_chat(request))
    except PenstockError as error:
        raise params.flattened(error, _NAMES) from None


async def count(service: Service, exchange: Exchange) -> None:
    """POST /v1/messages/count_tokens: the prompt's length in tokens. The engine is not asked."""
    await by_the_front(service, exchange, CountRequest, _counted)


def _counted(text: TextParts, _: dict[str, Any], request: CountRequest) -> dict[str, Any]:
    raw, asked = anthropic.as_chat(request)
    ids, _prompt = chat.prompt_ids(text, raw["messages"], chat.function_tools(raw, asked), asked)
    return {"input_tokens": len(ids)}


class MessagesRenderer(Renderer):
    """Anthropic's events. `ping` alone does not keep its clients waiting, an empty delta does."""

    def __init__(self, id: str, model: str, plan: Plan) -> None:
        super().__init__(1)
        self._message = {"id": f"msg_{id}", "type": "message", "role": "assistant", "model": model}
        self._prompt = len(plan.jobs[0].prompt)
        self._first = "thinking" if plan.in_reasoning else "text"
        self._at = -1
        self._open: str | None = None
        self._reason: str | None = None
        self._stop: str | None = None

    def opening(self) -> bytes:
        """The message without content; what is cached is known, and said, at the end."""
        begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = {"input_tokens": self._prompt, "output_tokens": 0}
        return _event("message_start", message={**self._message, **begun, "usage": usage}) + _event("ping")

    def keepalive(self) -> bytes:
        """An empty delta in the open block, which is opened if need be."""
        if self._open == "tool_use":
            return self._arguments("") + _event("ping")
        return self._say(self._open or self._first, "") + _event("ping")

    def piece(self, piece: Piece) -> bytes:
        """Deltas in their blocks; a tool call is a block of its own, open while it is written."""
        data = b""
        for delta in piece.deltas:
            if delta.reasoning:
                data += self._say("thinking", delta.reasoning)
            if delta.content:
                data += self._say("text", delta.content)
            for part in delta.call_parts:
                if part.id is not None:
                    data += self._begin("tool_use", {**_tool_use(part), "input": {}})
                if part.arguments:
                    data += self._arguments(part.arguments)
        self._end_of(piece)
        return data

    def ending(self, usage: dict[str, Any]) -> bytes:
        """The last block's end, an empty text's where nothing was said; why it ended, and what it took."""
        empty = self._say("text", "") if self._at < 0 else b""
        told = _event("message_delta", delta=self._ended(), usage=_usage(usage))
        return empty + self._close() + told + _event("message_stop")

    def failure(self, error: PenstockError) -> bytes:
        """An error event."""
        return b"event: error\ndata: " + encode(error.anthropic()) + b"\n\n"

    def collect(self, piece: Piece) -> int:
        """As all renderers, and why it ended."""
        self._end_of(piece)
        return super().collect(piece)

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The message."""
        said = self.collected(0)
        content: list[dict[str, Any]] = []
        if said.reasoning:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.content or not (content or said.tool_calls):
            content.append({"type": "text", "text": said.content})
        for call in said.tool_calls:
            # What stands there as an escape may be a lone surrogate, which is no text.
            text = json.dumps(json.loads(call.arguments), ensure_ascii=False).encode(errors="replace")
            content.append({**_tool_use(call), "input": msgspec.json.decode(text)})
        return {**self._message, "content": content, **self._ended(), "usage": _usage(usage)}

    def _end_of(self, piece: Piece) -> None:
        if piece.finish_reason is not None:
            self._reason, self._stop = piece.finish_reason, piece.stop

    def _ended(self) -> dict[str, Any]:
        reason = "stop_sequence" if self._stop is not None else _REASONS.get(self._reason or "stop")
        return {"stop_reason": reason, "stop_sequence": self._stop}

    def _say(self, kind: str, text: str) -> bytes:
        data = b""
        if self._open != kind:
            block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            data = self._begin(kind, block)
        delta = {"type": f"{kind}_delta", kind: text}
        return data + _event("content_block_delta", index=self._at, delta=delta)

    def _arguments(self, text: str) -> bytes:
        delta = {"type": "input_json_delta", "partial_json": text}
        return _event("content_block_delta", index=self._at, delta=delta)

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        closed = self._close()
        self._open, self._at = kind, self._at + 1
        return closed + _event("content_block_start", index=self._at, content_block=block)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._at)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + encode({"type": kind, **fields}) + b"\n\n"


def _tool_use(call: ToolCall | CallPart) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    """Anthropic counts what came from the cache apart from the rest of the prompt."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["completion_tokens"],
    }
