"""/v1/chat/completions: messages to a plan, and a generation to OpenAI's chat shapes.

Every check that can refuse a request runs before the response's status line: fields, template, ids, context.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from penstock.api import params, structured
from penstock.api.exchange import Exchange
from penstock.api.generation import Plan
from penstock.api.renderer import OpenAIRenderer, encode
from penstock.api.schema import MAX_TOOLS_SIZE, ChatRequest
from penstock.api.service import Service
from penstock.api.sse import respond
from penstock.api.structured import Asked
from penstock.supervisor.ticket import Progress
from penstock.text import borders
from penstock.text.assembler import Assembler, Delta, TokenLogprob
from penstock.text.calls import CallPart
from penstock.text.grammar import forced
from penstock.text.parts import TextParts
from penstock.text.tools import ToolCall


async def create(service: Service, exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    await respond(service, exchange, ChatRequest, prepare, ChatRenderer)


async def prepare(
    service: Service, raw: dict[str, Any], request: ChatRequest, *, stream_calls: bool = True
) -> Plan:
    """Everything up to the ids. Raises PenstockError for what can be refused.

    stream_calls: a stream's renderer shows the parts of calls (see `Delta`).
    """
    params.refuse(request)
    ready, text = await service.wait_ready()
    defaults = params.chosen_defaults(service.defaults, text.generation)
    sampling = params.sampling(request, defaults, ready.vocab_size, ready.context_length)
    tools = function_tools(raw, request)
    asked = structured.asked(request, tools)
    encoding = partial(_encode, text, raw["messages"], tools, request, asked)
    loop = asyncio.get_running_loop()
    ids, in_reasoning, edges, turn, grammar = await loop.run_in_executor(service.pool, encoding)
    job = params.job(request, service.defaults, ready, sampling, ids, "messages")
    stops = job.stops or not asked.several
    job = replace(job, borders=edges, turn=turn, grammar=grammar, stops=stops)
    assembler = partial(
        Assembler,
        text.tokenizer,
        stops=params.stops(request),
        reasoning=text.reasoning,
        tools=(forced(text.tools) if asked else text.tools) if tools else None,
        tool_schemas=tools,
        in_reasoning=in_reasoning,
        stream_calls=stream_calls and bool(request.stream),
        single_call=not asked.several,
        settled=asked.schema is not None,
    )
    retained = len(encode(tools)) * 4 if tools else 0
    return params.plan(request, [job], assembler, retained, in_reasoning=in_reasoning)


def function_tools(raw: dict[str, Any], request: ChatRequest) -> list[dict[str, Any]] | None:
    """The function tools as the client wrote them; other types are left out, as clients expect, or all."""
    if request.tool_choice == "none":
        return None
    kept = []
    for at, (tool, written) in enumerate(zip(request.tools or [], raw.get("tools") or [], strict=True)):
        if tool.type in (None, "function"):
            if tool.function is None:
                raise params.invalid(f"tools[{at}].function", "this field is required.")
            kept.append(written)
    if len(encode(kept)) > MAX_TOOLS_SIZE:
        raise params.invalid("tools", f"all tools together are limited to {MAX_TOOLS_SIZE:,} bytes.")
    return kept or None


def _encode(
    text: TextParts, messages: list[Any], tools: list[Any] | None, request: ChatRequest, asked: Asked
) -> tuple[array[int], bool, list[int], int | None, str]:
    """Ids up to where the answer starts, whether that is inside reasoning, where messages begin, the grammar.

    On the pool: it is slow.
    """
    ids, prompt = prompt_ids(text, messages, tools, request)
    inside = text.reasoning is not None and text.reasoning.starts_in_reasoning(prompt)
    closed = text.reasoning is not None and prompt.rstrip().endswith(text.reasoning.end)
    grammar = asked.grammar(text, None if closed else inside)
    render = partial(_render, text, tools=tools, request=request)
    edges, turn = borders.found(ids, prompt, text.markers, text.tokenizer, messages, render)
    return ids, inside, edges, turn, grammar


def prompt_ids(
    text: TextParts, messages: list[Any], tools: list[Any] | None, request: ChatRequest
) -> tuple[array[int], str]:
    """A conversation's ids and text, up to where the answer starts. Slow: for the pool."""
    prompt = _render(text, messages, tools, request)
    return text.tokenizer.encode(prompt, add_special_tokens=text.template.adds_special_tokens), prompt


def _render(text: TextParts, messages: list[Any], tools: list[Any] | None, request: ChatRequest) -> str:
    kwargs, roles = template_kwargs(request), request.role_mapping
    return text.template.render(messages, tools, kwargs=kwargs, role_mapping=roles)


def template_kwargs(request: ChatRequest) -> dict[str, Any]:
    """What the template may know: whether to think, or how much, and what the request sets by name."""
    effort = request.reasoning_effort
    told: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        told = {"enable_thinking": False}
    return told | (request.chat_template_kwargs or {})


class ChatRenderer(OpenAIRenderer):
    """OpenAI's chat shapes. The hot path is a concatenation around the text."""

    id_prefix, chunk_object, whole_object = "chatcmpl", "chat.completion.chunk", "chat.completion"
    member, nothing = b"delta", b"{}"

    def __init__(self, id: str, model: str, plan: Plan) -> None:
        super().__init__(id, model, plan)
        self._text_heads = [head + b'{"content":' for head in self._heads]
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._close

    def opening(self) -> bytes:
        """The role chunk of every choice."""
        begun = b'{"role":"assistant","content":""}'
        return b"".join(self.chunk(index, begun) for index in range(len(self._heads)))

    def keepalive(self) -> bytes:
        """An empty delta: some clients hang up on comments."""
        return self.chunk(0, b"{}")

    def delta(self, index: int, delta: Delta) -> bytes:
        """Text alone, or all fields that something came for."""
        if not (delta.reasoning or delta.call_parts or delta.logprobs):
            return self._text_heads[index] + encode(delta.content) + self._text_tail if delta.content else b""
        fields: dict[str, Any] = _reasoning(delta)
        if delta.content:
            fields["content"] = delta.content
        if delta.call_parts:
            fields["tool_calls"] = [_call_part(part) for part in delta.call_parts]
        return self.chunk(index, encode(fields), encode(self.logprobs(index, delta.logprobs)))

    def progress(self, progress: Progress, cached: int, milliseconds: float) -> bytes:
        """llama.cpp's prompt_progress, in a chunk with an empty delta."""
        told = {"total": progress.total, "cache": cached, "processed": progress.done}
        told["time_ms"] = round(milliseconds)
        return self.keepalive().removesuffix(b"}\n\n") + b',"prompt_progress":' + encode(told) + b"}\n\n"

    def said(self, answer: Delta) -> dict[str, Any]:
        """The message."""
        content = answer.content or None if answer.tool_calls else answer.content
        message = {"role": "assistant", "content": content, "refusal": None, **_reasoning(answer)}
        if answer.tool_calls:
            message["tool_calls"] = [_tool_call(call) for call in answer.tool_calls]
        return {"message": message}

    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Each token with its likeliest rivals."""
        return {"content": entries, "refusal": None} if entries else None


def _reasoning(delta: Delta) -> dict[str, Any]:
    return {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning} if delta.reasoning else {}


def _call_part(part: CallPart) -> dict[str, Any]:
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    return {"index": part.index, **_tool_call(part)}


def _tool_call(call: ToolCall | CallPart) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
