"""/v1/chat/completions: messages to a plan, and a generation to OpenAI's chat shapes.

Every check that can refuse a request runs before the response's status line: fields, template, ids, context.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from functools import partial
from typing import Any

import msgspec

from penstock.api import params
from penstock.api.admission import UNSENT
from penstock.api.body import read_request
from penstock.api.exchange import Exchange
from penstock.api.generation import Generation, Piece, Plan
from penstock.api.schema import ChatRequest
from penstock.api.service import Service
from penstock.api.sse import answer
from penstock.supervisor.ticket import Job, Progress
from penstock.text import borders
from penstock.text.assembler import Assembler, Delta
from penstock.text.parts import TextParts

_encode = msgspec.json.encode


async def create(service: Service, exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    with service.admission.lease() as lease:
        raw, request = await read_request(exchange, lease, ChatRequest, service.pool, service.timing.body)
        with exchange.ends_with_client():
            plan = await prepare(service, raw, request)
            usage = plan.include_usage
            del raw, request
            ids = sum(4 * len(job.prompt) + UNSENT * job.n for job in plan.jobs)
            lease.resize(ids + plan.retained)
            renderer = ChatRenderer(f"chatcmpl-{exchange.id}", service.model_name, plan.jobs[0].n, usage)
            await answer(service, exchange, Generation(service.backend, plan), renderer, lease)


async def prepare(service: Service, raw: dict[str, Any], request: ChatRequest) -> Plan:
    """Everything up to the ids. Raises PenstockError for what can be refused."""
    params.refuse(request)
    params.check_model(request.model, service.served_names, service.strict_model_names)
    stops = params.stops(request)
    ready, text = await service.wait_ready()
    vocab, context = ready.vocab_size, ready.context_length
    sampling = params.sampling(
        request, params.chosen_defaults(service.defaults, text.generation), vocab, context
    )
    tools = None if request.tool_choice == "none" else _tools(raw, request)
    encode = partial(_encode_chat, text, raw["messages"], tools, request)
    ids, in_reasoning, edges, turn = await asyncio.get_running_loop().run_in_executor(service.pool, encode)
    params.check_length(len(ids), ready, "messages")
    job = Job(
        prompt=ids,
        sampling=sampling,
        n=request.n or 1,
        max_tokens=params.most_tokens(request, service.defaults.get("max_tokens"), context),
        min_tokens=min(request.min_tokens or 0, context),
        ignore_eos=bool(request.ignore_eos),
        seed=request.seed,
        borders=edges,
        turn=turn,
    )
    assembler = partial(
        Assembler,
        text.tokenizer,
        stops=stops,
        reasoning=text.reasoning,
        tools=text.tools if tools else None,
        tool_schemas=tools,
        in_reasoning=in_reasoning,
    )
    return params.plan(request, [job], assembler, retained=len(_encode(tools)) * 4 if tools else 0)


def _tools(raw: dict[str, Any], request: ChatRequest) -> list[dict[str, Any]] | None:
    """The function tools as the client wrote them; other types are left out, as clients expect."""
    kept = []
    for at, (tool, written) in enumerate(zip(request.tools or [], raw.get("tools") or [], strict=True)):
        if tool.type in (None, "function"):
            if tool.function is None:
                raise params.invalid(f"tools[{at}].function", "this field is required.")
            kept.append(written)
    return kept or None


def _encode_chat(
    text: TextParts, messages: list[Any], tools: list[Any] | None, request: ChatRequest
) -> tuple[array[int], bool, list[int], int | None]:
    """Ids up to where the answer starts, whether that is inside reasoning, and where messages begin.

    On the pool: it is slow.
    """
    template, mapping = text.template, request.role_mapping
    prompt = template.render(messages, tools, True, request.chat_template_kwargs, mapping)
    inside = text.reasoning is not None and text.reasoning.starts_in_reasoning(prompt)
    ids = text.tokenizer.encode(prompt, add_special_tokens=template.adds_special_tokens)
    edges, turn = borders.found(
        ids,
        prompt,
        text.markers,
        text.tokenizer,
        template,
        messages,
        tools,
        request.chat_template_kwargs,
        mapping,
    )
    return ids, inside, edges, turn


class ChatRenderer:
    """Chunks of one stream, or one whole answer. The hot path is a concatenation around the text."""

    def __init__(self, id: str, model: str, choices: int, include_usage: bool) -> None:
        self._fields = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._open = b"data: " + _encode(self._fields)[:-1] + b',"choices":['
        self._close = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._heads = [self._open + b'{"index":%d,"delta":' % index for index in range(choices)]
        self._text_heads = [head + b'{"content":' for head in self._heads]
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._close
        self.keepalive = self._chunk(0, b"{}")
        self._answers = [_Answer() for _ in range(choices)]

    def _chunk(self, index: int, delta: bytes, logprobs: bytes = b"null", reason: bytes = b"null") -> bytes:
        tail = b',"logprobs":' + logprobs + b',"finish_reason":' + reason + b"}"
        return self._heads[index] + delta + tail + self._close

    def opening(self, choices: int) -> bytes:
        """The role chunk of every choice."""
        return b"".join(self._chunk(at, b'{"role":"assistant","content":""}') for at in range(choices))

    def piece(self, piece: Piece) -> bytes:
        """One chunk per delta, and one with the finish reason."""
        data = b""
        for delta in piece.deltas:
            if not (delta.reasoning or delta.tool_calls or delta.logprobs):
                if delta.content:
                    data += self._text_heads[piece.index] + _encode(delta.content) + self._text_tail
            else:
                logprobs = _encode(_logprobs(delta.logprobs)) if delta.logprobs else b"null"
                data += self._chunk(piece.index, _encode(_fields(delta)), logprobs)
        if piece.finish_reason is not None:
            data += self._chunk(piece.index, b"{}", reason=_encode(piece.finish_reason))
        return data

    def progress(self, progress: Progress, cached: int, milliseconds: float) -> bytes:
        """llama.cpp's prompt_progress, in a chunk with an empty delta."""
        told = {"total": progress.total, "cache": cached, "processed": progress.done}
        told["time_ms"] = round(milliseconds)
        return self.keepalive.removesuffix(b"}\n\n") + b',"prompt_progress":' + _encode(told) + b"}\n\n"

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk after the last, without choices."""
        return b"data: " + _encode({**self._fields, "choices": [], "usage": usage}) + b"\n\n"

    def collect(self, piece: Piece) -> int:
        """Keep a piece for the whole answer; returns the characters kept."""
        return sum(self._answers[piece.index].add(delta) for delta in piece.deltas) + self._answers[
            piece.index
        ].end(piece.finish_reason)

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer without streaming."""
        choices = [{"index": at, **answer.choice()} for at, answer in enumerate(self._answers)]
        return {**self._fields, "object": "chat.completion", "choices": choices, "usage": usage}


class _Answer:
    """What one choice of a whole answer has said so far."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._finish_reason: str | None = None

    def add(self, delta: Delta) -> int:
        self._content.append(delta.content)
        self._reasoning.append(delta.reasoning)
        self._tool_calls += [_tool_call(call) for call in delta.tool_calls]
        self._logprobs += [_logprob(entry) for entry in delta.logprobs]
        return len(delta.content) + len(delta.reasoning) + 500 * len(delta.logprobs) + 100

    def end(self, reason: str | None) -> int:
        self._finish_reason = reason
        return 0

    def choice(self) -> dict[str, Any]:
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or None if self._tool_calls else content,
        }
        message["refusal"] = None
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if self._tool_calls:
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"} for call in self._tool_calls
            ]
        logprobs = {"content": self._logprobs, "refusal": None} if self._logprobs else None
        return {"message": message, "logprobs": logprobs, "finish_reason": self._finish_reason}


def _fields(delta: Delta) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if delta.reasoning:
        fields |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.content:
        fields["content"] = delta.content
    if delta.tool_calls:
        fields["tool_calls"] = [_tool_call(call) for call in delta.tool_calls]
    return fields


def _tool_call(call: Any) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprobs(entries: Any) -> dict[str, Any]:
    return {"content": [_logprob(entry) for entry in entries], "refusal": None}


def _logprob(entry: Any) -> dict[str, Any]:
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "bytes": entry.bytes,
        "top_logprobs": [
            {"token": token, "logprob": logprob, "bytes": raw} for _, token, raw, logprob in entry.top
        ],
    }
