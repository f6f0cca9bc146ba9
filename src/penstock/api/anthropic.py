"""Anthropic's Messages requests: what is accepted, and the chat request that says the same. Pure.

Invariant: what has no meaning for the model (cache marks, billing lines, unknown fields) never reaches the
prompt, so it can't cost the prompt cache; what has meaning is passed on where it stands. Parts that are not
text are refused by their path, but for images in the results of tools.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from penstock.api.params import invalid, unsupported
from penstock.api.schema import MAX_STOPS, UNSEEN, Asked, ChatRequest, Share, Some, Stop

BILLING = "x-anthropic-billing-header:"
"""A line of Claude Code's first system block; it differs between sessions and says nothing to the model."""
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
_SKIPPED = ("redacted_thinking",)

Json = dict[str, Any]


class Block(Struct):
    """A content block of any kind; which fields it needs depends on `type`."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Json | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


Content = str | list[Block]


class Turn(Struct):
    role: Literal["user", "assistant", "system"]
    content: Content


class AnthropicTool(Struct):
    """Tools of other types than `custom` run at the vendor's, not all have a name; they are left out."""

    name: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    type: str | None = None
    description: str | None = None
    input_schema: Json | None = None


class Typed(Struct):
    type: str


class ToolChoice(Struct):
    """name: of the tool that is to be called, where `type` is `tool`."""

    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: Json


class OutputConfig(Struct):
    format: OutputFormat | None = None


class CountRequest(Asked, kw_only=True):
    """What makes the prompt: the body of /v1/messages/count_tokens."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: Content | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Typed | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: Some | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    output_config: OutputConfig | None = None


def as_chat(request: CountRequest) -> tuple[Json, ChatRequest]:
    """The same as a chat request, plain and checked. Raises UNSUPPORTED_FIELD, INVALID_FIELD."""
    messages = _system(request.system)
    for at, turn in enumerate(request.messages):
        messages += _turn(turn, f"messages[{at}]")
    chat: Json = {"messages": messages, "tools": _tools(request.tools or [])}
    if request.tool_choice is not None:
        chat |= _choice(request.tool_choice)
    if request.thinking is not None:
        chat["chat_template_kwargs"] = {"enable_thinking": request.thinking.type != "disabled"}
    if isinstance(request, MessagesRequest):
        for name in ("max_tokens", "stream", "temperature", "top_p", "top_k"):
            chat[name] = getattr(request, name)
        chat["stop"] = request.stop_sequences or None
        if request.output_config is not None and (form := request.output_config.format) is not None:
            named = {"name": "output", "schema": form.schema}
            chat["response_format"] = {"type": "json_schema", "json_schema": named}
    return chat, msgspec.convert(chat, ChatRequest)


def _choice(choice: ToolChoice) -> Json:
    if choice.type == "tool" and choice.name is None:
        raise invalid("tool_choice.name", "this field is required.")
    named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": _CHOICES.get(choice.type, named),
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }


def _system(content: Content | None) -> list[Json]:
    if content is None:
        return []
    blocks = [Block("text", content)] if isinstance(content, str) else content
    texts = [_text(block, f"system[{at}]") for at, block in enumerate(blocks)]
    while texts and texts[0].startswith(BILLING):
        texts[:1] = filter(None, texts[0].split("\n", 1)[1:])
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


def _turn(turn: Turn, path: str) -> list[Json]:
    """A turn as chat messages: each tool's result is a message of its own, before the text behind it."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    messages: list[Json] = []
    for at, block in enumerate(turn.content):
        where = f"{path}.content[{at}]"
        if block.type == "tool_result":
            result = _result(block.content or "", f"{where}.content")
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
        elif block.type not in _SKIPPED:
            if not messages or messages[-1]["role"] == "tool":
                messages.append({"role": turn.role, "content": []})
            _add(messages[-1], block, where)
    return messages or [{"role": turn.role, "content": ""}]


def _add(message: Json, block: Block, where: str) -> None:
    if block.type == "thinking":
        message["reasoning_content"] = message.get("reasoning_content", "") + (block.thinking or "")
    elif block.type == "tool_use":
        if not block.name:
            raise invalid(f"{where}.name", "this field is required.")
        function = {"name": block.name, "arguments": block.input or {}}
        call = {"id": block.id, "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)
    else:
        message["content"].append({"type": "text", "text": _text(block, where)})


def _result(content: Content, path: str) -> str:
    """What a tool returned, in words."""
    if isinstance(content, str):
        return content
    texts = (UNSEEN if one.type == "image" else _text(one, f"{path}[{at}]") for at, one in enumerate(content))
    return "".join(texts)


def _text(block: Block, path: str) -> str:
    if block.type != "text":
        what = f"content of type {block.type[:40]!r} is not supported; this server reads text only."
        raise unsupported(f"{path}.type", what)
    if block.text is None:
        raise invalid(f"{path}.text", "this field is required.")
    return block.text


def _tools(tools: list[AnthropicTool]) -> list[Json] | None:
    """Those that run elsewhere keep their places: an error names a tool by its number."""
    written: list[Json] = []
    for at, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            written.append({"type": "elsewhere"})
            continue
        if tool.name is None:
            raise invalid(f"tools[{at}].name", "this field is required.")
        function: Json = {"name": tool.name, "parameters": tool.input_schema or {"type": "object"}}
        if tool.description is not None:
            function["description"] = tool.description
        written.append({"type": "function", "function": function})
    return written or None
