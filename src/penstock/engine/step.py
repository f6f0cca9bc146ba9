"""A step on its way: what was launched, how its inputs are put together, and how it is read.

Owns no state of the engine; the loop holds at most one `InFlight`. Invariant: nothing here waits for the
device but `wait_for_chunk`, `lists` and `collect_errors`, which are how the loop waits.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from penstock import wire
from penstock.engine.sampler import Sampled
from penstock.engine.scheduler import Chunk
from penstock.engine.sequence import Sequence
from penstock.memory.ledger import Lease

SPEED_DECAY = 0.5
"""Weight of the last chunk in the measured prefill speed."""
FAILURES = (RuntimeError, ValueError, MemoryError)
"""How MLX says that something went wrong, perhaps long before."""


@dataclass(slots=True)
class InFlight:
    """A launched step: its decode rows and their draws (B,), and the prefill arrays to be waited for."""

    rows: tuple[Sequence, ...]
    chunk: Chunk | None
    lease: Lease
    began: float
    forward: tuple[mx.array, mx.array] | None = None
    """Logits (B, V) and inputs (B,) of decode rows whose draws wait for a mask."""
    draws: Sampled | None = None
    chunk_arrays: Any = None
    lasting: int = 0
    """Bytes held beside transients and the pool when it was launched: rows that end meanwhile are in it."""
    orphans: int = 0
    """Closed rows' states in the stack that it replaced: they are there until it has run."""

    def seconds(self, read_at: float) -> float:
        """How long it has been running; `read_at`: when the step before was read, which ran until then.

        From before its launch on, because MLX's CPU back end computes most of a step in `async_eval`.
        """
        return time.monotonic() - max(self.began, read_at)

    def seconds_per_prefill_id(self, read_at: float, before: float | None) -> float:
        """The measured speed of prefill, after a chunk; `before`: what it was."""
        assert self.chunk is not None
        speed = self.seconds(read_at) / self.chunk.length
        return speed if before is None else SPEED_DECAY * speed + (1 - SPEED_DECAY) * before

    def wait_for_chunk(self) -> None:
        """Until it is computed. Its row may leave right after that: nothing here may keep its buffers."""
        mx.eval(self.chunk_arrays)
        self.chunk_arrays = None


def members(step: InFlight | None) -> tuple[Sequence, ...]:
    """All sequences whose rows a step computes."""
    if step is None:
        return ()
    return step.rows if step.chunk is None else (*step.rows, step.chunk.sequence)


def inputs(rows: tuple[Sequence, ...], before: InFlight | None) -> mx.array:
    """Each row's next input id, (B,) int32: a draw of `before` where the host does not know it yet."""
    if before is None or before.draws is None or not any(s.input_on_device for s in rows):
        return mx.array([s.tokens[s.launched] for s in rows], dtype=mx.int32)
    if rows == before.rows:
        return before.draws.tokens
    place = {s.id: i for i, s in enumerate(before.rows)}
    known = [0 if s.input_on_device else s.tokens[s.launched] for s in rows]
    index = [place[s.id] if s.input_on_device else len(before.rows) + i for i, s in enumerate(rows)]
    return mx.concatenate([before.draws.tokens, mx.array(known, dtype=mx.int32)])[mx.array(index)]


def lists(draws: Sampled) -> tuple[list[int], list[float] | None, list[list[tuple[int, float]]] | None]:
    """Draws on the host: ids, their log-probabilities, each row's likeliest (id, log-probability)."""
    tokens: Any = draws.tokens.tolist()
    logprobs: Any = None if draws.logprobs is None else draws.logprobs.tolist()
    if draws.top_ids is None or draws.top_logprobs is None:
        return tokens, logprobs, None
    ids: Any = draws.top_ids.tolist()
    values: Any = draws.top_logprobs.tolist()
    return tokens, logprobs, [list(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]


def answers(rows: tuple[Sequence, ...], draws: Sampled) -> list[tuple[Sequence, wire.Row]]:
    """What there is to tell of each row's draw, once it is read and nothing has failed before it."""
    tokens, logprobs, top = lists(draws)
    check()
    found = []
    for i, sequence in enumerate(rows):
        asked = sequence.sampling.logprobs
        chosen = [logprobs[i]] if logprobs is not None and asked is not None else None
        likeliest = [top[i][:asked]] if top is not None and asked else None
        found.append((sequence, wire.Row(sequence.id, [tokens[i]], chosen, likeliest)))
    return found


def check() -> None:
    """Launch next to nothing: launching is where MLX reports what failed before, if reading did not raise."""
    mx.async_eval(mx.array(0) + 1)  # type: ignore[no-untyped-call]


def collect_errors() -> None:
    """Take the errors that MLX still holds back, then hand freed memory back."""
    for _ in range(16):
        try:
            mx.synchronize()
            break
        except RuntimeError:
            continue
    gc.collect()
    mx.clear_cache()
