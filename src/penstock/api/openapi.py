"""The OpenAPI document, from the structs that decode the requests."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from penstock.api import params
from penstock.api.anthropic import CountRequest, MessagesRequest
from penstock.api.responses_request import READ, ResponsesRequest
from penstock.api.schema import Asked, ChatRequest, CompletionRequest
from penstock.api.tokens import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, tuple[type[Asked], str]] = {
    "/v1/chat/completions": (ChatRequest, "Chat completion"),
    "/v1/completions": (CompletionRequest, "Text completion"),
    "/v1/messages": (MessagesRequest, "Anthropic's Messages"),
    "/v1/messages/count_tokens": (CountRequest, "A prompt's length in tokens"),
    "/v1/responses": (ResponsesRequest, "OpenAI's Responses"),
    "/tokenize": (TokenizeRequest, "A text's or a chat's token ids"),
    "/detokenize": (DetokenizeRequest, "The text of token ids"),
}
"""What is posted, by path."""


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    error: ErrorDetail


class MessagesErrorDetail(Struct):
    type: str
    message: str


class MessagesErrorBody(Struct):
    type: str
    error: MessagesErrorDetail


def _operation(summary: str, answer: str = "The answer", body: type[Struct] = ErrorBody) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    told = {"200": {"description": answer}, "default": {"description": "Error", "content": error}}
    return {"summary": summary, "responses": told}


def _post(kind: type[Asked], summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    streams = "stream" in kind.__struct_fields__
    answer = "JSON, or server-sent events with `stream`" if streams else "The answer"
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    error = MessagesErrorBody if issubclass(kind, CountRequest) else ErrorBody
    return {"post": _operation(summary, answer, error) | {"requestBody": body}}


def openapi(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document, generated from the structs above."""
    kinds = [kind for kind, _ in BODIES.values()]
    schemas, components = msgspec.json.schema_components(
        [*kinds, ErrorBody, MessagesErrorBody], ref_template="#/components/schemas/{name}"
    )
    since = {"name": "since", "in": "query", "schema": {"type": "number"}}
    for schema in components.values():  # what a field may hold whose feature is not there
        for name in params.UNSUPPORTED.keys() & schema.get("properties", {}).keys():
            accepted, why = params.UNSUPPORTED[name]
            schema["properties"][name] |= {"enum": list(accepted), "description": why}
    elsewhere = {"type": "string", "not": {"enum": READ}}
    for name in ("Item", "ResponsesTool"):  # of other types they may hold anything
        other = {"type": "object", "properties": {"type": elsewhere}, "required": ["type"]}
        components[name] = {"anyOf": [components[name], other]}
    posts = zip(BODIES.items(), schemas, strict=False)
    one = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version},
        "paths": {
            **{path: _post(kind, summary, schema) for (path, (kind, summary)), schema in posts},
            "/v1/models": {"get": _operation("The models served")},
            "/v1/models/{id}": {"get": _operation("One model") | {"parameters": [one]}},
            "/v1/status": {"get": _operation("Memory by owner, requests, cache, events")},
            "/v1/status/history": {
                "get": _operation("A sample a second of the last ten minutes") | {"parameters": [since]}
            },
            "/v1/requests/{id}/cancel": {
                "post": _operation("End a request; its client gets an error") | {"parameters": [one]}
            },
            "/v1/cache/clear": {"post": _operation("Drop all cached prefixes; requests go on")},
            "/metrics": {"get": _operation("Prometheus' text format")},
            "/health": {"get": _operation("200 when ready, else 503 with the state")},
        },
        "components": {"schemas": components},
    }
