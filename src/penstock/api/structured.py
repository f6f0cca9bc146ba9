"""What `response_format`, `tool_choice` and `parallel_tool_calls` ask of an answer: checks, then a grammar.

Owns the meaning of these fields together: calls that are asked for go before a format; with `auto` an answer
is either. Refuses what names no function and what no grammar can hold, by field. The grammar is made on the
pool, once the prompt is known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.api.params import invalid
from penstock.api.schema import ChatRequest, NamedChoice, Sampled
from penstock.errors import Kind, PenstockError
from penstock.text import grammar
from penstock.text.parts import TextParts

_NAME = re.compile(r"[a-zA-Z0-9_-]+")


@dataclass(frozen=True)
class Asked:
    """What an answer has to be. Falsy: whatever the model writes.

    schema: (schema, its field, strict); functions: (field, the function as the client wrote it), of which a
    call must be, if `forced`, or may be.
    """

    schema: tuple[Any, str, bool] | None = None
    functions: Sequence[tuple[str, dict[str, Any]]] = ()
    forced: bool = False
    several: bool = True

    def __bool__(self) -> bool:
        return self.schema is not None or self.forced

    def grammar(self, text: TextParts, opened: bool | None) -> str:
        """As `text.grammar.answer` makes it, or "" for what is free. For the pool. Raises INVALID_FIELD."""
        if not self:
            return ""
        if text.tokenizer.pieces is None:
            message = "this model's tokenizer does not tell the text of single tokens, which a grammar needs."
            param = "tool_choice" if self.forced else "response_format"
            raise PenstockError(Kind.UNSUPPORTED_FIELD, f"{param}: {message}", param=param)
        schema = None
        if self.schema is not None and not self.forced:
            value, param, strict = self.schema
            schema = grammar.json_rule(value, param, strict=strict)
        functions = [_function(path, written) for path, written in self.functions]
        return grammar.answer(text, opened, schema=schema, functions=functions, several=self.several)


def schema(request: Sampled) -> tuple[Any, str, bool] | None:
    """The schema of the answer's text, its field, and whether it is strict. Raises INVALID_FIELD."""
    form = request.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return form.schema or grammar.ANY_OBJECT, "response_format.schema", False
    if form.json_schema is None or form.json_schema.schema is None:
        missing = "response_format.json_schema" + (".schema" if form.json_schema else "")
        raise invalid(missing, "this field is required.")
    return form.json_schema.schema, "response_format.json_schema.schema", bool(form.json_schema.strict)


def asked(request: ChatRequest, tools: list[dict[str, Any]] | None) -> Asked:
    """What a chat request asks for. `tools`: its function tools, as written. Raises INVALID_FIELD."""
    choice, form = request.tool_choice, schema(request)
    places = [at for at, tool in enumerate(request.tools or []) if tool.type in (None, "function")]
    functions = [(f"tools[{places[at]}].function", tool["function"]) for at, tool in enumerate(tools or [])]
    forced = choice == "required" or isinstance(choice, NamedChoice)
    if forced and not functions:
        raise invalid("tool_choice", "there is no function in tools that could be called.")
    several = request.parallel_tool_calls is not False
    if isinstance(choice, NamedChoice):
        name, several = choice.function.name, False
        functions = [(path, function) for path, function in functions if function["name"] == name]
        if not functions:
            raise invalid("tool_choice.function.name", f"tools has no function {name[:64]!r}.")
    return Asked(form, functions, forced, several)


def _function(path: str, written: dict[str, Any]) -> grammar.Function:
    name = written["name"]
    if not _NAME.fullmatch(name):
        raise invalid(
            f"{path}.name", "the name of a function that is to be called has letters, digits, _ and - only."
        )
    parameters = written.get("parameters") or {"properties": {}, "additionalProperties": False}
    strict = bool(written.get("strict"))
    rule = grammar.json_rule({"type": "object", **parameters}, f"{path}.parameters", strict=strict)
    return grammar.Function(name, rule)
