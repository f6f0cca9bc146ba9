"""Prints the figures the demo model is accepted by, computed through mlx-lm's own loading and generation.

Bits per held-out byte against the 5-gram model, greedy replies that end by themselves, tool prompts
that give a parsable call. The prompts are of another seed, and their wordings and values are held out.
"""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import generate
from mlx_lm.utils import load
from tokenizers import Tokenizer
from tools.demo_model import conversations, shape
from tools.demo_model.conversations import Conversation, Sources
from tools.demo_model.corpus import Document
from tools.demo_model.data import stream_ids
from tools.demo_model.draw import Draw
from tools.demo_model.ngram import ByteNgram

from penstock.engine import gated_delta

WINDOW = 1024
REPLY = 200
PROMPTS = 100
_SEED = 1001


def figures(folder: Path, sources: Sources, held_out: list[Document], windows: int) -> dict[str, float]:
    """All figures of the model in ``folder``, printed and returned; ``windows`` 0 means all held-out text."""
    gated_delta.install()
    model, tokenizer = load(str(folder))
    shape.in_float32(model)
    model.eval()
    ids = stream_ids(Tokenizer.from_file(str(folder / "tokenizer.json")), held_out)
    count = len(ids) // WINDOW
    chosen = np.arange(count) if not windows else np.linspace(0, count - 1, windows).astype(int)
    ours = theirs = size = 0.0
    training = "\n\n".join(d.text for d in sources.documents).encode()
    yardstick = ByteNgram(training)
    for window in chosen:
        part = ids[window * WINDOW : (window + 1) * WINDOW]
        text = tokenizer.decode(part[1:].tolist(), skip_special_tokens=True).encode()
        ours += _bits(model, part)
        theirs += yardstick.bits(text)
        size += len(text)
    result = {
        "parameters": shape.parameters(model),
        "held-out bytes": size,
        "bits per byte": ours / size,
        "bits per byte, 5-gram": theirs / size,
    }
    print(json.dumps(result), flush=True)
    result |= _replies(model, tokenizer, folder, sources)
    result |= _tool_calls(model, tokenizer, folder, sources)
    for name, value in result.items():
        print(f"{name}: {value:,.3f}".removesuffix(".000"))
    return result


def accepted(result: dict[str, float]) -> bool:
    """Whether the figures are good enough to bundle the model."""
    return (
        result["bits per byte"] < result["bits per byte, 5-gram"]
        and result["replies ended"] >= 0.95 * PROMPTS
        and result["tool calls parsable"] >= 0.5 * PROMPTS
    )


def _bits(model: Any, ids: Any) -> float:
    """Bits of the window's tokens after the first; <|endoftext|> (id 0) is no text and not counted."""
    tokens = mx.array(ids.astype(np.int32))
    logits = model(tokens[None, :-1])[0].astype(mx.float32)
    picked = mx.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
    loss = mx.logsumexp(logits, axis=-1) - picked
    return float((loss * (tokens[1:] != 0)).sum()) / math.log(2)


def _reply(model: Any, tokenizer: Any, renderer: conversations.Renderer, c: Conversation) -> tuple[str, bool]:
    """The greedy reply, and whether it ended within ``REPLY`` tokens."""
    prompt = tokenizer.encode(renderer.prompt(c), add_special_tokens=False)
    text = generate(model, tokenizer, prompt, max_tokens=REPLY)
    return text, len(tokenizer.encode(text, add_special_tokens=False)) < REPLY


def _replies(model: Any, tokenizer: Any, folder: Path, sources: Sources) -> dict[str, float]:
    draw, renderer = Draw(_SEED, held_out=True), conversations.Renderer(folder / "chat_template.jinja")
    ended = right = 0
    for _ in range(PROMPTS):
        one = conversations.turn(draw, sources)
        messages = [*conversations.system(draw, sources), {"role": "user", "content": one.question}]
        text, closed = _reply(model, tokenizer, renderer, Conversation(messages, thinking=draw.chance(0.5)))
        ended += closed
        right += text.rpartition("</think>")[2].strip() == one.answer
        print(f"[{'ended' if closed else 'CUT'}] {one.question[-120:]!r} -> {text[-160:]!r}", flush=True)
    return {"replies ended": ended, "replies equal to the expected text": right}


def _tool_calls(model: Any, tokenizer: Any, folder: Path, sources: Sources) -> dict[str, float]:
    draw, renderer = Draw(_SEED, held_out=True), conversations.Renderer(folder / "chat_template.jinja")
    parsable = named = right = 0
    for _ in range(PROMPTS):
        c, expected = conversations.tool_prompt(draw, sources)
        text, _ = _reply(model, tokenizer, renderer, c)
        call = _call(tokenizer, text)
        parsable += call is not None
        named += call is not None and call["name"] == expected["name"]
        right += call == expected
        print(
            f"[{'same' if call == expected else 'call' if call else 'NONE'}] {expected} -> {text[-160:]!r}",
            flush=True,
        )
    return {"tool calls parsable": parsable, "tool calls of the right tool": named, "tool calls exact": right}


def _call(tokenizer: Any, text: str) -> dict[str, Any] | None:
    """The first call as mlx-lm's own parser reads it, if it is one."""
    _, opened, rest = text.partition("<tool_call>")
    inner, closed, _ = rest.partition("</tool_call>")
    if not (opened and closed):
        return None
    try:
        call = tokenizer.tool_parser(inner)
    except ValueError:
        return None
    return (
        call
        if isinstance(call, dict) and isinstance(call.get("arguments"), dict) and "name" in call
        else None
    )
