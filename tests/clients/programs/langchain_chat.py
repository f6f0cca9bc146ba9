"""LangChain's ChatOpenAI: arguments are the server's URL and the API."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url, api = sys.argv[1:]


def model(**more: Any) -> Any:
    chosen = {"use_responses_api": True, "output_version": "responses/v1"} if api == "responses" else {}
    return ChatOpenAI(model="m", base_url=url + "/v1", api_key="none", **chosen, **more)  # type: ignore[arg-type]


@tool
def read(path: str) -> str:
    """Reads a file."""
    return "Blue."


def refused() -> dict[str, Any]:
    try:
        model(temperature=101).invoke("hello")
    except Exception as error:
        return {"status": getattr(error, "status_code", None), "error": str(error)}
    return {}


def streamed(content: str) -> dict[str, Any]:
    parts: list[str] = []
    try:
        for chunk in model().stream(content):
            if chunk.text:
                parts.append(chunk.text)
    except Exception as error:
        return {"parts": parts, "error": str(error)}
    return {"parts": parts}


def tool_task(content: str) -> dict[str, Any]:
    bound = model().bind_tools([read])
    talk: list[Any] = [HumanMessage(content)]
    whole = None
    for chunk in bound.stream(talk):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    talk += [whole, ToolMessage(read.invoke(call["args"]), tool_call_id=call["id"])]
    return {"name": call["name"], "given": call["args"], "text": bound.invoke(talk).text}


results = {
    "chat": {"text": model().invoke("hello").text},
    "stream": streamed("count"),
    "tool": tool_task("which colour"),
    "refused": refused(),
    "broken": streamed("break here"),
}
print(json.dumps(results))
