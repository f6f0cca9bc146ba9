"""/v1/completions: prompts (text or ids, one or many) to a plan, and a generation to OpenAI's text shapes.

Choices are numbered prompt by prompt, n to each. Text is what the model writes, not split in any way.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from penstock.api import params, structured
from penstock.api.exchange import Exchange
from penstock.api.generation import Plan
from penstock.api.renderer import OpenAIRenderer, encode
from penstock.api.schema import CompletionRequest
from penstock.api.service import Service
from penstock.api.sse import respond
from penstock.text.assembler import Assembler, Delta, TokenLogprob
from penstock.text.parts import TextParts

MAX_CHOICES = 128
"""Prompts × n of one request."""


async def create(service: Service, exchange: Exchange) -> None:
    """POST /v1/completions."""
    await respond(service, exchange, CompletionRequest, prepare, CompletionRenderer)


async def prepare(service: Service, raw: dict[str, Any], request: CompletionRequest) -> Plan:
    """Everything up to the ids. Raises PenstockError for what can be refused."""
    params.refuse(request)
    prompts = _prompts(request.prompt)
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise params.invalid("prompt", f"at most {MAX_CHOICES} choices (prompts × n) are given at a time.")
    ready, text = await service.wait_ready()
    defaults = params.chosen_defaults(service.defaults, text.generation)
    sampling = params.sampling(request, defaults, ready.vocab_size, ready.context_length)
    asked = structured.Asked(structured.schema(request))
    grammar = await asyncio.get_running_loop().run_in_executor(service.pool, asked.grammar, text, None)
    jobs = []
    for path, prompt in prompts:
        ids = await _ids(service, text, prompt, path, ready.vocab_size)
        job = params.job(request, service.defaults, ready, sampling, ids, path)
        jobs.append(replace(job, grammar=grammar))
    assembler = partial(Assembler, text.tokenizer, stops=params.stops(request), continues=True)
    return params.plan(request, jobs, assembler)


def _prompts(prompt: str | list[str | int | list[int]]) -> list[tuple[str, str | list[int]]]:
    """Each prompt with its path. Raises INVALID_FIELD for lists of mixed kinds."""
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    kind = type(prompt[0])
    for at, item in enumerate(prompt):
        if type(item) is not kind:
            raise params.invalid(f"prompt[{at}]", "a list holds strings, ids or lists of ids, not a mixture.")
    if kind is int:
        return [("prompt", prompt)]  # type: ignore[list-item]
    return [(f"prompt[{at}]", item) for at, item in enumerate(prompt)]  # type: ignore[misc]


async def _ids(
    service: Service, text: TextParts, prompt: str | list[int], path: str, vocab_size: int
) -> array[int]:
    tokenizer = text.tokenizer
    if isinstance(prompt, str):
        encode = partial(tokenizer.encode, prompt, add_special_tokens=True)
        ids = await asyncio.get_running_loop().run_in_executor(service.pool, encode)
    else:
        ids = params.check_ids(prompt, vocab_size, path)
    if not ids:
        start = min(tokenizer.eos_ids, default=None) if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None:
            raise params.invalid(path, "must not be empty: this model has no token to start a text with.")
        ids = array("I", [start])
    return ids


class CompletionRenderer(OpenAIRenderer):
    """OpenAI's text shapes; text completions have no chunk for progress."""

    id_prefix, chunk_object, whole_object = "cmpl", "text_completion", "text_completion"
    member, nothing = b"text", b'""'

    def __init__(self, id: str, model: str, plan: Plan) -> None:
        super().__init__(id, model, plan)
        self._offsets = [0] * len(self._heads)

    def delta(self, index: int, delta: Delta) -> bytes:
        """The text, and what it weighs."""
        return self.chunk(index, encode(delta.content), encode(self.logprobs(index, delta.logprobs)))

    def said(self, answer: Delta) -> dict[str, Any]:
        """The text."""
        return {"text": answer.content}

    def logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Columns, one entry a token; offsets are in characters of the answer's text."""
        if not entries:
            return None
        offsets = list(accumulate((len(entry.token) for entry in entries), initial=self._offsets[index]))
        self._offsets[index] = offsets.pop()
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            # parts of characters read alike: the likeliest, which comes first, is to stay
            "top_logprobs": [{top.token: top.logprob for top in one.top_logprobs[::-1]} for one in entries],
            "text_offset": offsets,
        }
