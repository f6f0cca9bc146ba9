"""/tokenize and /detokenize, as vLLM and llama.cpp have them: text to ids and back, by the front alone.

Owns what answers without the engine share: the work runs on the text pool, the answer counts while it is
sent. Refuses more than MOST_IDS ids at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from penstock.api import chat, params
from penstock.api.body import Request, read_request
from penstock.api.exchange import Exchange
from penstock.api.schema import Asked, ChatRequest, Message
from penstock.api.service import Service
from penstock.text.parts import TextParts

MOST_IDS = 1 << 20
Json = dict[str, Any]


class TokenizeRequest(ChatRequest, kw_only=True):
    """`content` (llama.cpp) or `prompt` (vLLM), a text; or what a chat request holds, for its prompt."""

    messages: Annotated[list[Message], Meta(min_length=1)] | None = None  # type: ignore[assignment]
    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    """llama.cpp's, for `content`; false by default."""
    add_special_tokens: bool | None = None
    """vLLM's, for `prompt`; true by default."""
    add_generation_prompt: bool | None = None
    parse_special: Any = None
    with_pieces: Any = None
    return_token_strs: Any = None


class DetokenizeRequest(Asked, kw_only=True):
    tokens: Annotated[list[int], Meta(max_length=MOST_IDS)]


async def tokenize(service: Service, exchange: Exchange) -> None:
    """POST /tokenize."""
    await by_the_front(service, exchange, TokenizeRequest, partial(_tokenized, service))


async def detokenize(service: Service, exchange: Exchange) -> None:
    """POST /detokenize."""
    await by_the_front(service, exchange, DetokenizeRequest, partial(_detokenized, service))


async def by_the_front(
    service: Service,
    exchange: Exchange,
    kind: type[Request],
    work: Callable[[TextParts, Json, Request], Json],
) -> None:
    """Read a `kind`, do `work` on it on the pool, and answer what it returns as JSON."""
    with service.admission.lease() as lease:
        raw, request = await read_request(exchange, lease, kind, service.pool, service.timing.body)
        with exchange.ends_with_client():
            params.check_model(request.model, service.served_names, service.strict_model_names)
            text = await service.wait_text()
            loop, made = asyncio.get_running_loop(), partial(work, text, raw, request)
            answer = await loop.run_in_executor(service.pool, lambda: msgspec.json.encode(made()))
            lease.resize(len(answer))
            await exchange.respond(200, answer)


def _tokenized(service: Service, text: TextParts, raw: Json, request: TokenizeRequest) -> Json:
    params.refuse(request)
    given = [name for name in ("content", "prompt", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise params.invalid("content", "give one of content, prompt and messages.")
    if given == ["messages"]:
        open_turn, template = request.add_generation_prompt is not False, text.template
        fields = (open_turn, chat.template_kwargs(request), request.role_mapping)
        prompt = template.render(raw["messages"], chat.function_tools(raw, request), *fields)
        ids = text.tokenizer.encode(prompt, add_special_tokens=template.adds_special_tokens)
    elif request.content is not None:
        ids = text.tokenizer.encode(request.content, add_special_tokens=bool(request.add_special))
    else:
        special = request.add_special_tokens is not False
        ids = text.tokenizer.encode(request.prompt or "", add_special_tokens=special)
    if len(ids) > MOST_IDS:
        raise params.invalid(given[0], f"at most {MOST_IDS:,} tokens are given at a time, not {len(ids):,}.")
    ready = service.backend.ready
    most = ready.max_model_len if ready else None
    return {"tokens": ids.tolist(), "count": len(ids), "max_model_len": most}


def _detokenized(service: Service, text: TextParts, _: Json, request: DetokenizeRequest) -> Json:
    ready = service.backend.ready
    known = max(text.tokenizer.vocab_size, ready.vocab_size if ready else 0)
    said = text.tokenizer.decode(params.check_ids(request.tokens, known, "tokens"), skip_special_tokens=False)
    return {"content": said, "prompt": said}
