"""response_format, tool_choice and parallel_tool_calls: what is asked of the engine, and what is a 400."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.support.fake_backend import Server, say, serving

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
READ = {"type": "function", "function": {"name": "read", "parameters": SCHEMA}}
WRITE = {"type": "function", "function": {"name": "write"}}
NAMED = {"type": "function", "function": {"name": "read"}}


@pytest.fixture(scope="module", name="server")
def _server() -> Iterator[Server]:
    with serving(say("ok")) as running:
        yield running


def ask(server: Server, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    given = (
        {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    )
    with server.client() as client:
        return client.post(path, json={**given, **fields})


def grammar(server: Server, path: str = "/v1/chat/completions", **fields: Any) -> str:
    response = ask(server, path, **fields)
    assert response.status_code == 200, response.text
    return server.backend.runs[-1].job.grammar


def form(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def test_what_is_free_has_no_grammar(server: Server) -> None:
    assert grammar(server) == ""
    assert grammar(server, response_format={"type": "text"}) == ""
    for choice in ("auto", "none", None):
        assert grammar(server, tools=[READ], tool_choice=choice) == ""
    assert grammar(server, tools=[READ], parallel_tool_calls=False) == ""


def test_formats_become_grammars(server: Server) -> None:
    assert "%json" in grammar(server, response_format={"type": "json_object"})
    assert '"integer"' in grammar(server, response_format=form(SCHEMA))
    assert '"integer"' in grammar(server, response_format={"type": "json_object", "schema": SCHEMA})
    assert '"integer"' in grammar(server, "/v1/completions", response_format=form(SCHEMA))
    body = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "max_tokens": 9}
    assert '"integer"' in grammar(server, "/v1/messages", **body)


def test_choices_become_grammars_of_the_functions_they_leave(server: Server) -> None:
    every = grammar(server, tools=[READ, WRITE], tool_choice="required")
    assert "read" in every
    assert "write" in every
    assert ")*" in every
    single = grammar(server, tools=[READ, WRITE], tool_choice="required", parallel_tool_calls=False)
    assert ")*" not in single.replace("(.|\\n)*", "")
    named = grammar(server, tools=[READ, WRITE], tool_choice=NAMED)
    assert "write" not in named
    assert "%json" in named
    either = grammar(server, tools=[READ], response_format=form(SCHEMA))
    assert "| call" in either
    tools = [{"name": "read", "input_schema": SCHEMA}, {"name": "write", "input_schema": SCHEMA}]
    choice = {"type": "tool", "name": "read"}
    assert "write" not in grammar(server, "/v1/messages", tools=tools, tool_choice=choice)


FINE = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 99999989}}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json"}}, "response_format.type"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": form(None)}, "response_format.json_schema.schema"),
    ({"response_format": form([])}, "response_format.json_schema.schema"),
    ({"response_format": form({"type": "foo"})}, "response_format.json_schema.schema"),
    ({"response_format": form({"pattern": "["}, strict=True)}, "response_format.json_schema.schema"),
    ({"response_format": form({"$ref": "file:///etc/passwd"})}, "response_format.json_schema.schema"),
    ({"response_format": form({"$ref": "#"})}, "response_format.json_schema.schema"),
    ({"response_format": form({"not": {}}, strict=True)}, "response_format.json_schema.schema"),
    ({"response_format": form({"enum": ["x" * 300_000]})}, "response_format.json_schema.schema"),
    ({"response_format": form(FINE)}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
     "response_format.json_schema.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes", "tools": [READ]}, "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": [READ]}, "tool_choice.function"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [READ]},
     "tool_choice.function.name"),
    ({"tool_choice": "required", "tools": [{"type": "web"}, {"function": {"name": "a b"}}]},
     "tools[1].function.name"),
    ({"tool_choice": "required", "tools": [{"function": {"name": "a", "parameters": {"type": "foo"}}}]},
     "tools[0].function.parameters"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_what_cannot_be_enforced_is_refused_by_name(
    server: Server, fields: dict[str, Any], param: str
) -> None:
    before = len(server.backend.runs)
    response = ask(server, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert len(server.backend.runs) == before
    assert ask(server).status_code == 200


def test_keywords_that_cannot_be_enforced_pass_where_nobody_is_strict(server: Server) -> None:
    number, text = {"type": "integer", "foo": 1, "not": {"const": 3}}, {"type": "string", "pattern": "^(?!x)"}
    loose = {"type": "object", "properties": {"a": number, "b": text}}
    assert grammar(server, response_format=form(loose))
    assert grammar(server, tools=[{"function": {"name": "f", "parameters": loose}}], tool_choice="required")


def test_responses_ask_for_the_same(server: Server) -> None:
    with server.client() as client:
        flat = {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}
        assert client.post("/v1/responses", json={"input": "hi", "text": {"format": flat}}).status_code == 200
        assert '"integer"' in server.backend.runs[-1].job.grammar
        tools = [{"type": "function", "name": "read", "parameters": SCHEMA}]
        body = {"input": "hi", "tools": tools, "tool_choice": {"type": "function", "name": "read"}}
        assert client.post("/v1/responses", json=body).status_code == 200
        assert "read" in server.backend.runs[-1].job.grammar
