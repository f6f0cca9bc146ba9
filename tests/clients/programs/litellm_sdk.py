"""LiteLLM as a library: arguments are the server's URL and the API."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

url, api = sys.argv[1:]
litellm.suppress_debug_info = True
PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
TOOL = {"type": "function", "function": {"name": "read", "description": "Reads.", "parameters": PARAMETERS}}
WHERE: dict[str, Any] = (
    {"model": "anthropic/m", "api_base": url, "api_key": "none", "max_tokens": 100}
    if api == "messages"
    else {"model": "openai/m", "api_base": url + "/v1", "api_key": "none"}
)


def ask(*messages: Any, **more: Any) -> Any:
    return litellm.completion(messages=list(messages), **WHERE, **more)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def refused() -> dict[str, Any]:
    try:
        ask(user("hello"), temperature=101)
    except Exception as error:
        return {"status": getattr(error, "status_code", None), "error": str(error)}
    return {}


def streamed(content: str) -> dict[str, Any]:
    parts: list[str] = []
    try:
        for chunk in ask(user(content), stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                parts.append(chunk.choices[0].delta.content)
    except Exception as error:
        return {"parts": parts, "error": str(error)}
    return {"parts": parts}


def tool_task(content: str) -> dict[str, Any]:
    chunks = list(ask(user(content), tools=[TOOL], stream=True))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "Blue."}
    second = ask(user(content), message.model_dump(), result, tools=[TOOL])
    given = json.loads(call.function.arguments)
    return {"name": call.function.name, "given": given, "text": second.choices[0].message.content}


results = {
    "chat": {"text": ask(user("hello")).choices[0].message.content},
    "stream": streamed("count"),
    "tool": tool_task("which colour"),
    "refused": refused(),
    "broken": streamed("break here"),
}
print(json.dumps(results))
