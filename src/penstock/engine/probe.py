"""What the model at hand allows, found by trying at load: ragged batches, and steps launched ahead.

Owns two experiments. `compare`: rows of unequal length decode together, each step's log-probs against
mlx-lm's own single-sequence loop under the same forced tokens. `copies`: does a step launched before the
last one was read copy a row's buffer, because that one still reads it?
Refuses nothing: what can't be shown to be right runs serially, with the reason in a sentence. Invariant:
the probe leaves no array behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from penstock.engine import calibrate, device, loader
from penstock.engine.batch import Runner

STEPS = 6
LONGEST_WINDOW = 512
"""Windows beyond this are not filled by the probe: that prefill would cost more than it shows."""

FLOAT32_TOLERANCE = 1e-4
"""Per unit of the largest logit (1 at least). Rounding leaves about 1e-6; a key lost or a position off by
one, 1e-2 and more."""

LIKELY = 64
"""Where rounding is coarse only the likeliest ids are compared: the tail's log-probs are mostly rounding."""

NOISE_FACTOR = 4.0
PROBE_BYTES = 32 << 20
PROBE_LENGTH = 1 << 15
"""How large a row `copies` looks at, in bytes on the CPU, which computes what it launches, and in ids. A GPU
may be done with a short row before it is written again, and not with a long one."""
COPIED_SHARE = 0.1
"""Of a row's bytes: a copy of less than this is as cheap as waiting for the read."""


@dataclass(frozen=True, slots=True)
class Findings:
    """How to run this model, and why."""

    mode: str
    reason: str
    pipelined: bool


def probe(model: Any, forced: str = "auto", room: int = 4 * PROBE_BYTES) -> Findings:
    """Try the model within `room` bytes; `forced` "ragged" or "serial" settles the mode without trying it."""
    mode, reason = _mode(model) if forced == "auto" else (forced, "as told")
    return Findings(mode, reason, pipelined=not copies(model, mode, room))


def _mode(model: Any) -> tuple[str, str]:
    runner = Runner(model)
    if runner.mode == "serial":
        return "serial", runner.reason
    try:
        difference, tolerance = compare(runner, model)
    except Exception as error:  # model code may raise anything when it meets keys it can't handle
        words = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return "serial", f"a batch of unequal rows fails ({words})"
    finally:
        runner.reset()
    if difference <= tolerance:  # a NaN is not
        return "ragged", f"equal to single rows within {difference:.2g}"
    allowed = f"(allowed {tolerance:.2g})"
    return "serial", f"a batch of unequal rows differs from single rows by {difference:.2g} {allowed}"


def compare(runner: Runner, model: Any) -> tuple[float, float]:
    """The largest difference between rows in a batch and alone, and what rounding explains, in nats.

    In float32 the maximum over all ids counts. Else the yardstick is the model's own rounding: mlx-lm alone
    token by token and mlx-lm alone with all tokens in one pass are equally right, and differ by other kernels
    and orders of summation, which is all that may separate a batch from single rows. Measured as the root
    mean square over the likeliest ids; the worst row and step count, on both sides.
    """
    facts = loader.measure(model)
    prompts = _prompts(facts.windows, facts.vocab_size)
    forced = [
        [(7 * row + 13 * step + 5) % facts.vocab_size for step in range(STEPS)] for row in range(len(prompts))
    ]
    alone = mx.stack([_alone(model, prompt, tokens) for prompt, tokens in zip(prompts, forced, strict=True)])
    together = _together(runner, prompts, forced)
    largest = _largest(mx.abs(alone))
    if alone.dtype == mx.float32:
        difference = _largest(mx.abs(_logprobs(together) - _logprobs(alone)))
        return difference, FLOAT32_TOLERANCE * max(1.0, largest)
    one_pass = [_one_pass(model, prompt, tokens) for prompt, tokens in zip(prompts, forced, strict=True)]
    noise = max(_distance(mx.stack(one_pass), alone), mx.finfo(alone.dtype).eps * largest)
    return _distance(together, alone), NOISE_FACTOR * noise


def _prompts(windows: Sequence[int], vocab_size: int) -> list[list[int]]:
    """A row that starts from nothing, a long one, one between; around and beyond the smallest window."""
    window = min(windows, default=0)
    lengths = [1, window + 16, window - 3] if 8 <= window <= LONGEST_WINDOW else [1, 40, 17]
    return [[(31 * i + 11 * row + 3) % vocab_size for i in range(n)] for row, n in enumerate(lengths)]


def _alone(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> mx.array:
    """Logits (STEPS, V)."""
    cache = make_prompt_cache(model)
    if prompt[:-1]:
        model(mx.array([prompt[:-1]]), cache=cache)
        mx.eval([inner.state for inner in cache])
    steps = []
    for token in [prompt[-1], *tokens[:-1]]:
        steps.append(model(mx.array([[token]]), cache=cache)[0, -1])
        mx.eval(steps[-1])
    return mx.stack(steps)


def _one_pass(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> mx.array:
    """Logits (STEPS, V)."""
    logits = model(mx.array([[*prompt, *tokens[:-1]]]), cache=make_prompt_cache(model))[0]
    return mx.contiguous(logits[len(prompt) - 1 :])


def _together(runner: Runner, prompts: Sequence[Sequence[int]], forced: Sequence[Sequence[int]]) -> mx.array:
    """Logits (rows, STEPS, V) of all rows in a batch.

    One leaves and comes back meanwhile, so that joining and leaving are tried too.
    """
    rows = [runner.open(len(prompt) + STEPS) for prompt in prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt[:-1]:
            mx.eval(runner.prefill(row, prompt[:-1]))
    ids = [[prompt[-1], *tokens] for prompt, tokens in zip(prompts, forced, strict=True)]
    steps: list[list[mx.array]] = [[] for _ in rows]
    while any(len(done) < STEPS for done in steps):
        ready = [i for i, done in enumerate(steps) if len(done) < STEPS]
        if len(steps[1]) == 2 and len(steps[2]) < 4:
            ready.remove(1)
        logits = runner.decode([rows[i] for i in ready], mx.array([ids[i][len(steps[i])] for i in ready]))
        mx.eval(logits)
        for place, i in enumerate(ready):
            steps[i].append(logits[place])
    return mx.stack([mx.stack(row) for row in steps])


def _logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _distance(logits: mx.array, reference: mx.array) -> float:
    """Root mean square difference of the log-probs of the reference's likeliest ids, at the worst step."""
    most = min(LIKELY, reference.shape[-1])
    likely = mx.argpartition(-reference, most - 1, axis=-1)[..., :most]
    ours, theirs = (mx.take_along_axis(_logprobs(x), likely, axis=-1) for x in (logits, reference))
    return _largest(mx.sqrt(mx.square(ours - theirs).mean(axis=-1)))


def _largest(values: mx.array) -> float:
    return float(values.max().item())  # type: ignore[arg-type]


def copies(model: Any, mode: str, room: int) -> bool:
    """Whether launching a step before reading the last one copies K/V buffers.

    One row with a long context (faked: buffers of zeros, offsets set) takes the same steps read one by one
    and launched ahead; a short row does so too, which tells what running ahead costs besides copies. Takes
    at most about half of `room` for a moment.
    """
    runner = Runner(model, mode)
    per_token = calibrate.costs_of(runner).kv_per_token
    if not per_token:
        return False
    most = min(room // 4, PROBE_BYTES) if device.backend() == "cpu" else room // 4
    length = min(max(64, most // per_token), PROBE_LENGTH)
    excess = [_peak(runner, n, ahead=True) - _peak(runner, n, ahead=False) for n in (length, 16)]
    return excess[0] - excess[1] > COPIED_SHARE * length * per_token


def _peak(runner: Runner, length: int, *, ahead: bool) -> int:
    """The most bytes that steps of one row of `length` positions hold beyond what they start with."""
    row = runner.open(length + STEPS)
    tokens = mx.argmax(runner.decode([row], mx.array([1])), axis=-1)
    mx.eval(tokens)
    for cache in row.kv:
        cache.offset = length
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(STEPS - 1):
        following = mx.argmax(runner.decode([row], tokens), axis=-1)
        if ahead:
            mx.async_eval(following)  # type: ignore[no-untyped-call]
            mx.eval(tokens)
        else:
            mx.eval(following)
        tokens = following
    mx.eval(tokens)
    mx.synchronize()
    runner.close(row)
    return int(mx.get_peak_memory()) - int(before)
