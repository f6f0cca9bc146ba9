"""A client's messages, made fit for a model's template.

Owns the normal form (text for content, mappings for arguments, no nulls) and the two ways to mend a
conversation that a template refuses. Refuses parts that are not text. Invariant: a mend only joins or
relabels turns where they stand, so a longer conversation still begins with the shorter one's turns.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import takewhile
from typing import Any

from penstock.errors import Kind, PenstockError

Message = dict[str, Any]

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def normalise(messages: list[Message]) -> list[Message]:
    """New messages in the form templates expect. Raises PenstockError(INVALID_FIELD | UNSUPPORTED_FIELD)."""
    if not messages:
        raise PenstockError(Kind.INVALID_FIELD, "messages must hold at least one message.", param="messages")
    return [_normalised(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _normalised(message: Message, path: str) -> Message:
    plain = {key: value for key, value in message.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise PenstockError(Kind.INVALID_FIELD, "A message needs a role.", param=f"{path}.role")
    if plain["role"] == "developer":
        plain["role"] = "system"
    plain["content"] = _text(plain.get("content", ""), f"{path}.content")
    reasoning = next((plain[key] for key in _REASONING_FIELDS if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    calls = plain.pop("tool_calls", None)
    if calls and isinstance(calls, list):  # some templates take an empty list for a call
        plain["tool_calls"] = [_call(call) for call in calls]
    return plain


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PenstockError(Kind.INVALID_FIELD, "Content must be a string or a list of parts.", param=path)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(_TEXT_PARTS[kind]) if kind in _TEXT_PARTS else None
        if kind is not None and kind not in _TEXT_PARTS:
            message = f"Content parts of type {kind!r} are not supported; this server reads text only."
            raise PenstockError(Kind.UNSUPPORTED_FIELD, message, param=f"{path}[{index}].type")
        if not isinstance(text, str):
            raise PenstockError(Kind.INVALID_FIELD, "A content part needs text.", param=f"{path}[{index}]")
        texts.append(text)
    return "".join(texts)


def _call(call: Any) -> Any:
    """A tool call with its arguments as a mapping, which templates iterate over.

    What is no JSON object, such as arguments that were cut, becomes the one value of such a mapping.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    sent = arguments = function.get("arguments") or {}
    if isinstance(sent, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(sent) or {}
    arguments = arguments if isinstance(arguments, dict) else {"arguments": sent}
    return {**call, "function": {**function, "arguments": arguments}}


def tag_late_systems(messages: list[Message]) -> list[Message]:
    """Leading system messages joined into one; a later one, in place, as a user turn that says what it is."""
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    mended = [_joined(leading)] if leading else []
    for message in messages[len(leading) :]:
        if message["role"] == "system":
            mended.append({"role": "user", "content": f"<system>\n{message['content']}\n</system>"})
        else:
            mended.append(message)
    return mended


def join_turns(messages: list[Message]) -> list[Message]:
    """As `tag_late_systems`, the system text before the first user's, and turns of one side joined.

    For templates that know no system role or insist on user and assistant in turn.
    """
    groups: list[list[Message]] = []
    for message in tag_late_systems(messages):
        turn = {**message, "role": "user"} if message["role"] == "system" else message
        if groups and turn["role"] == "user" and groups[-1][0]["role"] in ("user", "tool"):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return [_joined(group) for group in groups]


def _joined(turns: list[Message]) -> Message:
    """The first, with the texts of all."""
    if len(turns) == 1:
        return turns[0]
    return {**turns[0], "content": "\n\n".join(turn["content"] for turn in turns if turn["content"])}


DEFAULT_ROLES = {"system": "ASSISTANT's RULE: ", "user": "USER: ", "assistant": "ASSISTANT: ", "stop": "\n"}
"""mlx_lm.server's words for models without a template."""


def plain_dialogue(messages: list[Message], roles: dict[str, str] | None) -> str:
    """The prompt for a model without a template, as mlx_lm.server writes it: prefix, content, `stop`."""
    roles = roles or DEFAULT_ROLES
    lines = [f"{roles.get(m['role'], '')}{m['content']}{roles.get('stop', '')}" for m in messages]
    return ("".join(lines) + roles.get("assistant", "")).rstrip()
