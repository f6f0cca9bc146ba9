"""/v1/completions: prompts (text or ids, one or many) to a plan, and a generation to OpenAI's text shapes.

Choices are numbered prompt by prompt, n to each. Text is what the model writes, not split in any way.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from functools import partial
from typing import Any

import msgspec

from penstock.api import params
from penstock.api.admission import UNSENT
from penstock.api.body import read_request
from penstock.api.exchange import Exchange
from penstock.api.generation import Generation, Piece, Plan
from penstock.api.schema import CompletionRequest
from penstock.api.service import Service
from penstock.api.sse import answer
from penstock.supervisor.ticket import Job, Progress
from penstock.text.assembler import Assembler
from penstock.text.parts import TextParts

MAX_CHOICES = 128
"""Prompts × n of one request."""

_encode = msgspec.json.encode


async def create(service: Service, exchange: Exchange) -> None:
    """POST /v1/completions."""
    with service.admission.lease() as lease:
        _, request = await read_request(exchange, lease, CompletionRequest, service.pool, service.timing.body)
        with exchange.ends_with_client():
            plan = await prepare(service, request)
            del _, request
            lease.resize(sum(4 * len(job.prompt) + UNSENT * job.n for job in plan.jobs))
            choices = sum(job.n for job in plan.jobs)
            renderer = CompletionRenderer(
                f"cmpl-{exchange.id}", service.model_name, choices, plan.include_usage
            )
            await answer(service, exchange, Generation(service.backend, plan), renderer, lease)


async def prepare(service: Service, request: CompletionRequest) -> Plan:
    """Everything up to the ids. Raises PenstockError for what can be refused."""
    params.refuse(request)
    params.check_model(request.model, service.served_names, service.strict_model_names)
    prompts, n = _prompts(request.prompt), request.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise params.invalid("prompt", f"at most {MAX_CHOICES} choices (prompts × n) are given at a time.")
    ready, text = await service.wait_ready()
    context = ready.context_length
    sampling = params.sampling(
        request, params.chosen_defaults(service.defaults, text.generation), ready.vocab_size, context
    )
    jobs = []
    for path, prompt in prompts:
        ids = await _ids(service, text, prompt, path, ready.vocab_size)
        params.check_length(len(ids), ready, path)
        jobs.append(
            Job(
                prompt=ids,
                sampling=sampling,
                n=n,
                max_tokens=params.most_tokens(request, service.defaults.get("max_tokens"), context),
                min_tokens=min(request.min_tokens or 0, context),
                ignore_eos=bool(request.ignore_eos),
                seed=request.seed,
            )
        )
    assembler = partial(Assembler, text.tokenizer, stops=params.stops(request), continues=True)
    return params.plan(request, jobs, assembler)


def _prompts(prompt: str | list[str | int | list[int]]) -> list[tuple[str, str | list[int]]]:
    """Each prompt with its path. Raises INVALID_FIELD for lists of mixed kinds."""
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    kind = type(prompt[0])
    for at, item in enumerate(prompt):
        if type(item) is not kind:
            raise params.invalid(
                f"prompt[{at}]", "a list holds strings, or ids, or lists of ids, not a mixture."
            )
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


class CompletionRenderer:
    """Chunks of one stream, or one whole answer."""

    keepalive = b": waiting\n\n"

    def __init__(self, id: str, model: str, choices: int, include_usage: bool) -> None:
        self._fields = {"id": id, "object": "text_completion", "created": int(time.time()), "model": model}
        opening = b"data: " + _encode(self._fields)[:-1] + b',"choices":['
        self._heads = [opening + b'{"index":%d,"text":' % index for index in range(choices)]
        self._close = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._offsets = [0] * choices
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(choices)]
        self._reasons: list[str | None] = [None] * choices

    def opening(self, choices: int) -> bytes:
        """Nothing: the headers are enough."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """One chunk per delta, and one with the finish reason."""
        data = b""
        for delta in piece.deltas:
            if delta.content or delta.logprobs:
                logprobs = _encode(self._entries(piece.index, delta.logprobs)) if delta.logprobs else b"null"
                data += self._chunk(piece.index, _encode(delta.content), logprobs, b"null")
        if piece.finish_reason is not None:
            data += self._chunk(piece.index, b'""', b"null", _encode(piece.finish_reason))
        return data

    def _chunk(self, index: int, text: bytes, logprobs: bytes, reason: bytes) -> bytes:
        tail = b',"logprobs":' + logprobs + b',"finish_reason":' + reason + b"}"
        return self._heads[index] + text + tail + self._close

    def progress(self, progress: Progress, cached: int, milliseconds: float) -> bytes:
        """Text completions have no chunk for it."""
        return b""

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk after the last, without choices."""
        return b"data: " + _encode({**self._fields, "choices": [], "usage": usage}) + b"\n\n"

    def collect(self, piece: Piece) -> int:
        """Keep a piece for the whole answer; returns about how many bytes that holds."""
        held = 0
        for delta in piece.deltas:
            self._texts[piece.index].append(delta.content)
            if delta.logprobs:
                self._logprobs[piece.index].append(self._entries(piece.index, delta.logprobs))
            held += len(delta.content) + 500 * len(delta.logprobs) + 100
        self._reasons[piece.index] = piece.finish_reason
        return held

    def whole(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer without streaming."""
        choices = []
        for index, (texts, parts, reason) in enumerate(
            zip(self._texts, self._logprobs, self._reasons, strict=True)
        ):
            logprobs = (
                {key: [entry for part in parts for entry in part[key]] for key in parts[0]} if parts else None
            )
            choices.append(
                {"index": index, "text": "".join(texts), "logprobs": logprobs, "finish_reason": reason}
            )
        return {**self._fields, "choices": choices, "usage": usage}

    def _entries(self, index: int, entries: Any) -> dict[str, Any]:
        """The completions shape of log-probabilities; offsets are in characters of the answer's text."""
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(entry.token)
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{token: logprob for _, token, _, logprob in entry.top} for entry in entries],
            "text_offset": offsets,
        }
