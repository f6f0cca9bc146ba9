"""The shape of `GET /v1/status` and of its history, which dashboard and terminal read.

Made from what the front knows at the moment, whatever the engine does. Bytes are bytes, times are seconds,
points in time are seconds of Unix time. No text of prompts or answers is in any of it. New fields may come;
those that are here keep their meaning.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from penstock import wire


class Memory(Struct, kw_only=True):
    """Of the engine, as it said at `at`; None where it has not said anything yet."""

    owners: dict[str, int] = {}
    """weights, pool, live_kv, states, cached, grammars, transient; they add up to `held`."""
    held: int = 0
    budget: int | None = None
    """What it may hold now, and what decided that; rows get no more."""
    budget_decided_by: str = ""
    ceiling: int | None = None
    """What it may ever hold."""
    ceiling_decided_by: str = ""
    active: int | None = None
    """What MLX says that it holds, and what freed buffers it keeps."""
    pooled: int | None = None
    predicted_transient: int | None = None
    """What was leased for the costliest of the last steps, and what that step held."""
    measured_transient: int | None = None
    correction: float = 1.0
    """How far measured transients exceed predicted ones."""
    front_held: int = 0
    """What the HTTP process holds for requests, beside the engine's bytes, and may hold."""
    front_limit: int = 0
    at: float | None = None


class Request(Struct, kw_only=True):
    """An open request, all its choices together."""

    id: str
    """As in `x-request-id`; `POST /v1/requests/{id}/cancel` ends it."""
    path: str
    stream: bool
    stage: str
    """queued, prefill, decode; a row that gave up its memory is queued again."""
    seconds: float
    """Since it was handed to the engine."""
    prompt: int
    """Tokens, of which `cached` needed no prefill; `why` not more: 'diverged at token 512', 'evicted'."""
    cached: int
    why: str
    prefilled: int
    """Tokens of the first choice's prompt that are computed; `eta`: seconds until all are."""
    eta: float | None = None
    generated: int = 0
    max_tokens: int | None = None
    tokens_per_second: float | None = None
    bytes: int | None = None
    """What its rows hold in the engine; None: nothing that was told."""
    preempted: bool = False
    restarts: int = 0
    """Engines that died under it."""


class Cache(Struct, kw_only=True):
    """The prompt cache. `queries` and `hits` are tokens, since the server's start."""

    bytes: int = 0
    tokens: int = 0
    nodes: int = 0
    entries: int = 0
    """Sequences kept: ends of the tree that no running request is on."""
    checkpoints: int = 0
    queries: int = 0
    hits: int = 0
    evicted: dict[str, int] = {}
    """Bytes since the server's start: memory (a request needed them), budget (it fell), caps, cleared."""
    tree: list[wire.Prefix] = []
    """The largest nodes, each after the one it hangs from. Asked of the engine when somebody looks."""
    tree_at: float | None = None


class Event(Struct, kw_only=True):
    """An error, or something that an operator may want to know: `count` alike, the last at `time`."""

    time: float
    kind: str
    """An error's label ('out_of_memory'), or engine_death, halted, budget_cut, preemption, audit_repair."""
    level: str
    """info, warning, error."""
    message: str
    advice: str = ""
    count: int = 1


class Status(Struct, kw_only=True):
    """GET /v1/status."""

    model: str
    state: str
    """downloading, loading, ready, stalled, restarting, unloaded, halted, stopping."""
    reason: str | None
    """Why it is restarting, stalled or halted."""
    stage: str
    """What a load is doing."""
    time: float
    uptime: float
    versions: dict[str, str]
    facts: wire.Ready | None
    """What the engine said of the model when it was first ready."""
    engine: dict[str, Any] | None
    """pid, epoch, phase, steps, rows; None while there is no process."""
    memory: Memory
    running: int
    """Choices on board, and those that wait."""
    queued: int
    requests: list[Request]
    """Oldest first."""
    cache: Cache
    counts: dict[str, int]
    """Since the server's start: shortened_chunks, waits, pool_clears, evictions, preemptions, given_up,
    step_errors, out_of_memory, audit_repairs, engine_deaths, continuations, prompt_tokens, cached_tokens,
    prefilled_tokens, generated_tokens."""
    cancels: dict[str, int]
    """Since the server's start, by the stage that the choice was in."""
    finished: dict[str, int]
    """Choices since the server's start, by reason: stop, length, abort, error."""
    errors: dict[str, int]
    """Answers that were errors since the server's start, by label."""
    events: list[Event]
    """The last ones, newest first."""
    given_back: dict[str, int]
    """When each part was last given back for want of requests."""
    decided_by: str
    """What decided the last chunk's length."""


class Mark(Struct, kw_only=True):
    """What happened in the second up to `time`: eviction, preemption, death; how many."""

    time: float
    kind: str
    count: int


class History(Struct, kw_only=True):
    """GET /v1/status/history?since=: about a sample a second of the last ten minutes, as columns."""

    interval: float
    time: list[float] = field(default_factory=list)
    budget: list[int | None] = field(default_factory=list)
    owners: dict[str, list[int]] = field(default_factory=dict)
    """As in `Memory.owners`, zeros while there is no engine."""
    running: list[int] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    """Computed and generated since the server's start: differences are speeds."""
    generated_tokens: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
