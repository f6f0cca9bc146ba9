"""What can be asked without a model at work: the models served, health, the schema. From snapshots only."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock import __version__
from penstock.api import openapi, params
from penstock.api.exchange import Exchange
from penstock.api.service import Service

_OPENAPI = msgspec.json.encode(openapi.openapi(__version__))
_TOLD = ("batch_mode", "batch_reason", "max_model_len", "backend", "device", "weights_bytes")
"""Of what the engine said when it was ready."""


def _model(service: Service, name: str) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": service.created, "owned_by": "penstock"}
    ready = service.backend.ready
    return model if ready is None else model | {"max_model_len": ready.max_model_len}


async def listed(service: Service, exchange: Exchange) -> None:
    """GET /v1/models."""
    data = [_model(service, name) for name in service.served_names]
    await exchange.respond_json(200, {"object": "list", "data": data})


async def one(service: Service, exchange: Exchange) -> None:
    """GET /v1/models/{id}; ids may contain slashes."""
    name = exchange.scope["path_params"]["id"]
    params.check_model(name, service.served_names, strict=True)
    await exchange.respond_json(200, _model(service, name))


async def health(service: Service, exchange: Exchange) -> None:
    """GET /health: 200 when the engine takes work at once, or has been unloaded until it comes."""
    backend = service.backend
    ready = backend.ready
    if backend.state not in ("ready", "unloaded") or ready is None or not service.has_text:
        status = "loading" if backend.state == "ready" else backend.state
        body = {**backend.snapshot(), "status": status, "reason": backend.reason}
        await exchange.respond_json(503, body, headers=[(b"retry-after", b"1")])
        return
    facts = {
        "status": "ok" if backend.state == "ready" else backend.state,
        "model": service.model_name,
        **{name: getattr(ready, name) for name in _TOLD},
        "front": {"held_bytes": service.admission.held, "open_requests": service.admission.open},
    }
    await exchange.respond_json(200, {**backend.snapshot(), **facts})


async def described(service: Service, exchange: Exchange) -> None:
    """GET /openapi.json."""
    await exchange.respond(200, _OPENAPI)


async def root(service: Service, exchange: Exchange) -> None:
    """GET and HEAD /: what this is."""
    await exchange.respond_json(200, {"server": "penstock", "model": service.model_name, "api": "/v1"})
