"""What crosses the border between the front and the engine: msgspec structs, msgpack, length-prefixed.

A frame is a 4-byte little-endian length and that many bytes of msgpack. Ids of sequences are chosen by the
front and never used again in its life; which engine (epoch) a message belongs to is the channel it came
through, so a late message of a dead engine is void because its channel is gone.

    front                                   engine
      Start(options) ───────────────────────▶
      ◀──────────────────────────────── Device
      Budget (again whenever it changes) ───▶
      ◀─────────────── Loading … Ready | Halt
      Submit, End, Release, Shutdown ───────▶
      ◀──── Step (one a step, all rows), Status

A sequence's life on the wire: one `Submit`, then any number of `Row`s, then exactly one `Ended`, which also
answers an `End`. After `Ended` the engine knows nothing of the id any more.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

FRAME_HEADER = 4
MAX_FRAME = 1 << 30
GRAMMAR_LIMITS: dict[str, Any] = {
    "max_grammar_size": 100_000,
    "max_lexer_states": 10_000,
    "verbose_errors": False,
}
"""llguidance's limits on a grammar, for who checks it and for who follows it: about 15 ms a step at worst."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a sequence's next id is drawn. The defaults are greedy. Semantics are mlx-lm's `sample_utils`.

    A draw's key is (seed, choice, position in the sequence's ids, purpose), so it does not depend on who
    shares the batch. Context sizes count the last ids of prompt and answer together.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logit_bias: dict[int, float] = {}
    seed: int = 0
    choice: int = 0
    logprobs: int | None = None
    """None: none; k ≥ 0: the chosen id's log-probability and the k most likely ids'."""


class EngineOptions(msgspec.Struct, frozen=True):
    """What the engine is told once, at its start."""

    model_path: str
    trust_remote_code: bool = False
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prefill_step_size: int = 2048
    stall_target_ms: float = 200.0
    prompt_cache_bytes: int | None = None
    prompt_cache_size: int | None = None
    """Caps on the prompt cache beside the budget, in bytes and in sequences; 0 turns it off."""
    hard_memory_limit: bool = False
    wire_weights: bool = False
    xtc_special: tuple[int, ...] = ()
    """Ids that XTC never takes away: newline and end of turn, as the tokenizer knows them."""
    batch_mode: str = "auto"
    """auto: what the probe at load finds to be right; ragged or serial: as told, for tests."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    options: EngineOptions


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A new sequence: ids as little-endian uint32; `delivered`: those already generated (continuation)."""

    id: int
    prompt: bytes
    sampling: Sampling
    arrival: int
    delivered: bytes = b""
    max_tokens: int | None = None
    """Counts delivered ids too; None: until the context or the memory ends."""
    min_tokens: int = 0
    ignore_eos: bool = False
    apart: int = 0
    """Up to this position it runs alone in its steps: it is suspected of having ended an engine there."""

    namespace: str = ""
    """Sequences see each other's prefixes only within one: of an API key, say."""
    borders: list[int] = []
    """Positions where messages begin, ascending; the last is the generation prompt's."""
    turn: int | None = None
    """Position where the next turn is expected to leave this prompt."""
    stops: bool = False
    """The front may end it at a stop string, which it finds when more has been drawn."""
    grammar: str = ""
    """What the answer may be, in llguidance's form of Lark; "": anything."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """The front ends a sequence: the first `keep` ids (prompt and answer) count, the rest is dropped."""

    id: int
    keep: int


class Budget(msgspec.Struct, frozen=True, tag="budget"):
    """How many bytes the engine may hold from now on; `ceiling` is the most it will ever be told."""

    size: int
    ceiling: int
    decided_by: str


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Nothing has run for a while: the pool goes back to the system; `cache`: the prompt cache, too."""

    cache: bool


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish the step in flight and exit with code 0."""


class Device(msgspec.Struct, frozen=True, tag="device"):
    """What computes, before anything is loaded; the answer is a `Budget`. Bytes."""

    backend: str
    """metal, cuda or cpu."""
    name: str
    limit: int | None
    """Metal: the recommended working set; CUDA: what is free now; CPU: none of its own."""
    used: int
    """What limits on processes count already: this process before a model."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of the start: what is being done, in words for people ('weights', 'probe')."""

    stage: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded and probed; sequences are taken from now on."""

    model_type: str
    context_length: int
    eos_ids: list[int]
    vocab_size: int
    backend: str
    device: str
    batch_mode: str
    batch_reason: str
    weights_bytes: int
    kv_bytes_per_token: int
    state_bytes: int
    """Bytes of a row's recurrent states, whatever its length."""
    versions: dict[str, str]
    longest: int = 0
    """The longest sequence that the ceiling holds beside the weights; 0: the memory sets no limit."""
    ceiling: int = 0
    """Bytes that the engine may ever hold, and what decided that."""
    decided_by: str = ""

    @property
    def max_model_len(self) -> int:
        """Ids that a prompt and its answer may have together: by the model and by the memory."""
        return min(self.context_length, self.longest or self.context_length)


class Halt(msgspec.Struct, frozen=True, tag="halt"):
    """The model cannot be served, and a restart would not mend it. One sentence says why."""

    reason: str


class Row(msgspec.Struct, frozen=True, array_like=True):
    """New ids of one sequence, with their log-probabilities where asked for."""

    id: int
    tokens: list[int]
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None


class Started(msgspec.Struct, frozen=True, array_like=True):
    """A prompt's first step: how many of its ids the cache had, and why not more."""

    id: int
    cached: int
    why: str


class Prefill(msgspec.Struct, frozen=True, array_like=True):
    """How far a prompt has been computed, in ids."""

    id: int
    done: int
    total: int


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """The last word on a sequence. `reason`: stop (end-of-turn id), length, cut (an `End`), error."""

    id: int
    reason: str
    computed: int
    kind: str | None = None
    """For an error: the name of the `errors.Kind`."""
    message: str | None = None


class Step(msgspec.Struct, frozen=True, tag="step"):
    """What one step brought, for all rows together."""

    rows: list[Row] = []
    started: list[Started] = []
    prefill: list[Prefill] = []
    ended: list[Ended] = []


class Prefix(msgspec.Struct, frozen=True):
    """A node of the prompt cache's tree: `tokens` that follow position `start` of those above it."""

    id: int
    parent: int | None
    """The nearest one above it that is told of."""
    start: int
    tokens: int
    bytes: int
    checkpoints: int
    hits: int
    age: int
    """Requests since it was last used."""
    borrowed: bool
    """Running requests hold what is there of it, or some of it."""


class Cached(msgspec.Struct, frozen=True):
    """The prompt cache's books."""

    tokens: int = 0
    nodes: int = 0
    entries: int = 0
    checkpoints: int = 0
    evicted: dict[str, int] = {}
    """Bytes since the engine's start, by reason."""
    tree: list[Prefix] = []
    """The largest nodes, parents first."""


class Status(msgspec.Struct, frozen=True, tag="status"):
    """The engine's books, at most twice a second. Bytes."""

    accounts: dict[str, int]
    """By owner; they add up to what is held."""
    budget: int
    floor: int
    """What the rows on board and their next step hold: below it rows are preempted."""
    least: int
    """The same for the oldest row alone: the budget is never cut below it."""
    active: int
    """What MLX says it holds, freed buffers apart."""
    pooled: int
    """Freed buffers that the allocator keeps."""
    running: int
    waiting: int
    counts: dict[str, int]
    """Measures since the start, by kind, and repairs of the audit."""
    decided_by: str = ""
    """What decided the last chunk's length."""
    seconds_per_prefill_id: float | None = None
    device_free: int | None = None
    """CUDA: what the device has left for anybody; None where the system's own memory is the device's."""
    device_held: int = 0
    """CUDA: what this process has of the device, with what its driver keeps of freed buffers."""
    rows: dict[int, int] = {}
    """What each sequence on board holds."""
    preempted: list[int] = []
    """Those that gave up their memory and wait."""
    transient: tuple[int, int] = (0, 0)
    """Of the steps since the last report, the costliest: what was leased for it, and what it held."""
    correction: float = 1.0
    """How far measured transients exceed predicted ones at the moment."""
    cache: Cached | None = None
    """None: nothing new is told."""


ToEngine = Start | Budget | Submit | End | Release | Shutdown
ToFront = Device | Loading | Ready | Halt | Step | Status

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
_to_front: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToFront)


def encode(message: ToEngine | ToFront) -> bytes:
    """One frame, header included."""
    body = _encoder.encode(message)
    return len(body).to_bytes(FRAME_HEADER, "little") + body


def decode_to_engine(body: bytes | memoryview) -> ToEngine:
    """The message in a frame's body, on the engine's side. Raises msgspec.ValidationError."""
    return _to_engine.decode(body)  # type: ignore[no-any-return]


def decode_to_front(body: bytes | memoryview) -> ToFront:
    """The message in a frame's body, on the front's side. Raises msgspec.ValidationError."""
    return _to_front.decode(body)  # type: ignore[no-any-return]


def pack_ids(ids: array[int]) -> bytes:
    """Ids as the wire carries them: little-endian uint32. `ids` has typecode 'I'."""
    return ids.tobytes()


def unpack_ids(packed: bytes) -> array[int]:
    """The ids of `pack_ids`, typecode 'I'."""
    ids = array("I")
    ids.frombytes(packed)
    return ids
