"""OpenAI's Responses requests: what is accepted, and the chat request that says the same. Pure.

Invariant: the items of an answer, sent back, become the one assistant turn that they were, so that the next
prompt begins with this one. Nothing is stored here: what refers to a stored response or item is refused by
name, and so are parts that are not text, but for images in the results of tools. Items and tools of types
that run elsewhere are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from penstock.api.body import misfit
from penstock.api.params import invalid, unsupported
from penstock.api.schema import UNSEEN, Asked, ChatRequest, Share, Some

Json = dict[str, Any]

PLAIN = "plain:"
"""Before reasoning that we hand out as `encrypted_content`, which is not: others' can't be read here."""
_STATELESS = "nothing is stored here; send the whole conversation as input."
_UNSUPPORTED = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "stored prompts are not supported; send instructions and input.",
    "background": "answers in the background are not supported.",
    "top_logprobs": "log-probabilities are given by /v1/chat/completions.",
}
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")
_FORMS: Json = {"reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}}}
_CHOICES: Json = {"metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
_NAMED = ("instructions", "max_output_tokens", "max_tool_calls", "prompt_cache_key", "safety_identifier")
_REPEATED = {**dict.fromkeys(_NAMED), "user": None, **_CHOICES, **_FORMS}
"""What an answer repeats of its request, and what it says where the request said nothing."""
_ITEMS = ("message", "reasoning", "function_call", "function_call_output", "item_reference")
READ = (None, *_ITEMS, "function", "namespace")
"""The types of items and tools that are more than left out."""

Name = Annotated[str, Meta(min_length=1, max_length=127)]


class Part(Struct):
    """A part of a content; which fields it needs depends on `type`."""

    type: str
    text: str | None = None
    refusal: str | None = None


Content = str | list[Part]


class Item(Struct):
    """An item of any kind; which fields it needs depends on `type`, which a message may lack."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    namespace: Name | None = None
    name: Name | None = None
    arguments: str | None = None
    output: Content | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None


class ResponsesTool(Struct):
    """A function, or a namespace of functions; other types are left out of the prompt."""

    type: str
    name: Name | None = None
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    tools: list[ResponsesTool] | None = None


class Reasoning(Struct):
    effort: str | None = None


class ResponsesRequest(Asked, kw_only=True):
    """The body of /v1/responses."""

    input: Annotated[list[Item], Meta(min_length=1)] | str
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Some | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Share | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=1024)] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Json | None = None
    include: list[str] | None = None
    chat_template_kwargs: Json | None = None

    @classmethod
    def readable(cls, raw: Any) -> Any:
        """Of items and tools of types that run elsewhere the type alone: the rest may be of any form."""
        if not isinstance(raw, dict):
            return raw
        lists = {key: raw[key] for key in ("input", "tools") if isinstance(raw.get(key), list)}
        return raw | {key: [cls.readable(_reduced(one)) for one in given] for key, given in lists.items()}


def _reduced(one: Any) -> Any:
    elsewhere = isinstance(one, dict) and one.get("type") not in READ
    return {"type": one["type"]} if elsewhere else one


@dataclass(frozen=True)
class Echo:
    """What an answer says of its request.

    fields: repeated in every response object. names: of the functions in namespaces, as the model knows
    them, to (namespace, name). encrypted: reasoning is wanted as `encrypted_content` too.
    """

    fields: Json
    names: dict[str, tuple[str, str]]
    encrypted: bool


def echo(raw: Json, request: ResponsesRequest) -> Echo:
    """What the answer will say of this request; `raw` is its body."""
    fields = {key: usual if raw.get(key) is None else raw[key] for key, usual in _REPEATED.items()}
    fields |= {key: {**usual, **fields[key]} for key, usual in _FORMS.items()}
    known = _functions(request.tools or []).items()
    names = {name: (space, tool.name or "") for name, (space, tool, _) in known if space}
    return Echo(fields, names, "reasoning.encrypted_content" in (request.include or []))


def own_names(request: ResponsesRequest) -> dict[str, str]:
    """Fields of the chat request as this one has them."""
    functions = enumerate(_functions(request.tools or []).values())
    tools = {f"tools[{at}].function": place for at, (_, _, place) in functions}
    return {**tools, "messages": "input", "response_format": "text.format"}


def as_chat(raw: Json, request: ResponsesRequest) -> tuple[Json, ChatRequest]:
    """The same as a chat request, plain and checked. Raises UNSUPPORTED_FIELD, INVALID_FIELD."""
    for name, why in _UNSUPPORTED.items():
        if raw.get(name):
            raise unsupported(name, why)
    if "message.output_text.logprobs" in (request.include or []):
        raise unsupported("include", _UNSUPPORTED["top_logprobs"])
    functions = _functions(request.tools or []).items()
    chat: Json = {
        "messages": _messages(request),
        "max_tokens": request.max_output_tokens,
        "tools": [_chat_tool(known, tool) for known, (_, tool, _) in functions] or None,
        "tool_choice": _choice(request.tool_choice),
        "response_format": _response_format(request.text),
        "reasoning_effort": request.reasoning and request.reasoning.effort,
    }
    for name in ("stream", "temperature", "top_p", "parallel_tool_calls", "chat_template_kwargs"):
        chat[name] = getattr(request, name)
    try:
        return chat, msgspec.convert(chat, ChatRequest)
    except msgspec.ValidationError as error:  # a choice or a format of no known kind, too many functions
        raise misfit(str(error)) from None


def _messages(request: ResponsesRequest) -> list[Json]:
    messages = [{"role": "system", "content": [request.instructions]}] if request.instructions else []
    given = request.input
    items = [Item(role="user", content=given)] if isinstance(given, str) else given
    for at, item in enumerate(items):
        _add(messages, item, f"input[{at}]")
    if not messages:
        raise invalid("input", "there is nothing in it that this server can read.")
    texts = ("content", "reasoning_content")  # lists until now, so that joining is linear
    return [turn | {key: "".join(turn[key]) for key in texts if key in turn} for turn in messages]


def _add(messages: list[Json], item: Item, path: str) -> None:
    """Another item of the conversation: a turn of its own, or part of the assistant's last."""
    kind = item.type or "message"
    if kind == "message" and item.role is None:
        raise invalid(f"{path}.role", "this field is required.")
    if kind == "item_reference":
        raise unsupported(path, f"items by reference are not supported: {_STATELESS}")
    if kind == "message" and item.role == "assistant":
        said = _turn(messages, may_join_message=False).setdefault("content", [])
        said.append(_text(item.content, f"{path}.content"))
    elif kind == "message":
        messages.append({"role": item.role, "content": [_text(item.content, f"{path}.content")]})
    elif kind == "reasoning":
        if thought := _thought(item, path):
            _turn(messages, may_join_message=False).setdefault("reasoning_content", []).append(thought)
    elif kind == "function_call":
        if item.name is None:
            raise invalid(f"{path}.name", "this field is required.")
        function = {"name": _known(item.namespace, item.name), "arguments": item.arguments or "{}"}
        call = {"id": item.call_id, "type": "function", "function": function}
        _turn(messages, may_join_message=True).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        result = _text(item.output, f"{path}.output", images=UNSEEN)
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": [result]})


def _turn(messages: list[Json], may_join_message: bool) -> Json:
    """The assistant's turn that an item belongs to: after a message only a call goes on with the same."""
    last = messages[-1] if messages else {}
    ended = "content" in last and "tool_calls" not in last
    if last.get("role") != "assistant" or (ended and not may_join_message):
        messages.append({"role": "assistant"})
    return messages[-1]


def _thought(item: Item, path: str) -> str:
    """A reasoning item's text, in the first form that holds any."""
    plain = (item.encrypted_content or "").partition(PLAIN)[2]  # no cipher's letters hold that
    text = _text(item.content, f"{path}.content")
    return text or plain or _text(item.summary, f"{path}.summary")


def _text(content: Content | None, path: str, images: str | None = None) -> str:
    """The parts' texts; `images` stands for each image, which is refused without."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for at, part in enumerate(content):
        text = part.text if part.refusal is None else part.refusal
        if part.type == "input_image" and images is not None:
            text = images
        elif part.type not in _TEXTS:
            what = f"content of type {part.type[:40]!r} is not supported; this server reads text only."
            raise unsupported(f"{path}[{at}].type", what)
        elif text is None:
            raise invalid(f"{path}[{at}].text", "this field is required.")
        texts.append(text or "")
    return "".join(texts)


def _known(namespace: str | None, name: str) -> str:
    return f"{namespace}__{name}" if namespace else name


def _functions(tools: list[ResponsesTool]) -> dict[str, tuple[str | None, ResponsesTool, str]]:
    """The functions, those in namespaces too: as the model knows it → (namespace, function, its field)."""
    found = {}
    for at, tool in enumerate(tools):
        space = tool.name if tool.type == "namespace" else None
        for number, one in enumerate((tool.tools or []) if space else [tool]):
            place = f"tools[{at}]" + (f".tools[{number}]" if space else "")
            if one.type == "function":
                if one.name is None:
                    raise invalid(f"{place}.name", "this field is required.")
                found[_known(space, one.name)] = space, one, place
    return found


def _chat_tool(known: str, tool: ResponsesTool) -> Json:
    function: Json = {"name": known, "parameters": tool.parameters or {"type": "object"}}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(choice: str | Json | None) -> str | Json | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(text: Json | None) -> Any:
    form = (text or {}).get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: form[key] for key in form if key != "type"}}
