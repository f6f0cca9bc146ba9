"""The OpenAPI document, from the structs that decode the requests."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from penstock.api.anthropic import CountRequest, MessagesRequest
from penstock.api.responses_request import ResponsesRequest
from penstock.api.schema import ChatRequest, CompletionRequest


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    error: ErrorDetail


def _operation(summary: str, body: dict[str, Any] | None, answer: str = "The answer") -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": answer}, "default": {"description": "Error", "content": error}},
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def openapi(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document, generated from the structs above."""
    bodies = [ChatRequest, CompletionRequest, MessagesRequest, CountRequest, ResponsesRequest, ErrorBody]
    (chat, completion, message, count, response, _), components = msgspec.json.schema_components(
        bodies, ref_template="#/components/schemas/{name}"
    )
    reply = "JSON, or server-sent events with `stream`"
    one = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    since = {"name": "since", "in": "query", "schema": {"type": "number"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version},
        "paths": {
            "/v1/chat/completions": {"post": _operation("Chat completion", chat, reply)},
            "/v1/completions": {"post": _operation("Text completion", completion, reply)},
            "/v1/messages": {"post": _operation("Anthropic's Messages", message, reply)},
            "/v1/messages/count_tokens": {"post": _operation("A prompt's length in tokens", count)},
            "/v1/responses": {"post": _operation("OpenAI's Responses", response, reply)},
            "/v1/models": {"get": _operation("The models served", None)},
            "/v1/models/{id}": {"get": _operation("One model", None) | {"parameters": [one]}},
            "/v1/status": {"get": _operation("Memory by owner, requests, cache, events", None)},
            "/v1/status/history": {
                "get": _operation("A sample a second of the last ten minutes", None) | {"parameters": [since]}
            },
            "/v1/requests/{id}/cancel": {
                "post": _operation("End a request; its client gets an error", None) | {"parameters": [one]}
            },
            "/v1/cache/clear": {"post": _operation("Drop all cached prefixes; requests go on", None)},
            "/metrics": {"get": _operation("Prometheus' text format", None)},
            "/health": {"get": _operation("200 when ready, else 503 with the state", None)},
        },
        "components": {"schemas": components},
    }
