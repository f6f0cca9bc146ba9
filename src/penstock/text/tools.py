"""Tool calls as models write them: mlx-lm's parsers, loaded without mlx-lm.

Owns the way from the text between a call's markers to (name, JSON arguments). Refuses whatever is not a
call: no name, arguments that are no JSON object. Invariant: `parse` returns calls whose arguments are JSON
text, or None and then the caller shows the text; it never raises.

The parsers are plain modules, but `import mlx_lm` loads MLX and opens a stream. So their directory is
loaded as a package of its own name; `mlx_lm` stays out of sys.modules.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.text.errors import ModelFilesError

_PACKAGE = "_penstock_tool_parsers"


@dataclass(frozen=True)
class ToolCall:
    """One call: `index` counts from 0 in the answer, `arguments` is the text of a JSON object."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """A model's way to write calls. `end` may be "": then a call ends with the answer."""

    name: str
    start: str
    end: str
    parser: Callable[[str, list[dict[str, Any]] | None], Any]

    def parse(self, text: str, schemas: list[dict[str, Any]] | None, index: int) -> list[ToolCall] | None:
        """The calls in the text between the markers, numbered from `index`; None if it is not all calls."""
        try:
            parsed = self.parser(text, schemas)
            found = parsed if isinstance(parsed, list) else [parsed]
            calls = [_call(one, index + n) for n, one in enumerate(found)]
        except Exception:  # whatever a model wrote, and however a parser fails on it: it is text then
            return None
        known = {schema["function"]["name"] for schema in schemas or []}
        if any(call.name == "unknown" and call.name not in known for call in calls):
            return None  # what mlx-lm's glm47 says of a call that it could not read
        return calls or None


def _call(parsed: dict[str, Any], index: int) -> ToolCall:
    name, arguments, id = parsed["name"], parsed.get("arguments"), parsed.get("id")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("not a call")
    name.encode()
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(arguments, allow_nan=False)  # a lone surrogate survives only as an escape
    # Some models are trained on ids of their own form, and read them again in the next turn.
    return ToolCall(index, id if isinstance(id, str) and id else f"call_{secrets.token_hex(12)}", name, text)


def usable_schemas(tools: list[Any] | None) -> list[dict[str, Any]]:
    """The function tools of a request, as the parsers expect them: a name, and parameters with properties."""
    usable = []
    for tool in tools or []:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            continue
        parameters = function.get("parameters")
        parameters = dict(parameters) if isinstance(parameters, dict) else {}
        if not isinstance(parameters.get("properties"), dict):
            parameters["properties"] = {}
        usable.append({"type": "function", "function": {**function, "parameters": parameters}})
    return usable


_HARMONY = re.compile(r"([\w.-]+)(?:(?!<\|message\|>).)*<\|message\|>(.*)", re.DOTALL)


def _parse_harmony(text: str, _: Any) -> dict[str, Any]:
    """`NAME … <|message|>{JSON}`: what gpt-oss writes after `to=functions.`."""
    match = _HARMONY.fullmatch(text)
    if match is None:
        raise ValueError("no call")
    return {"name": match[1], "arguments": match[2]}


def tool_format(name: str) -> ToolFormat:
    """The format called `name` (a module of mlx-lm's tool_parsers, or harmony). Raises ModelFilesError."""
    if name == "harmony":
        return ToolFormat(name, "to=functions.", "<|call|>", _parse_harmony)
    if not name.isidentifier():
        raise ModelFilesError(f"The model names a tool parser that is none: {name!r}.")
    _load_package()
    try:
        module = importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise ModelFilesError(f"The model needs a tool parser that this mlx-lm lacks: {name!r}.") from error
    return ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def _load_package() -> None:
    if _PACKAGE in sys.modules:
        return
    parent = importlib.util.find_spec("mlx_lm")  # finds, without importing
    for root in (parent.submodule_search_locations or []) if parent else []:
        folder = Path(root) / "tool_parsers"
        if folder.is_dir():
            spec = importlib.machinery.ModuleSpec(_PACKAGE, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
            return
    raise ModelFilesError("mlx-lm is not installed, or has no tool parsers.")
