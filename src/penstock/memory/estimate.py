"""What can be said of a model's memory before it runs: the transient by formula, and what a budget holds.

`transient` gives start values for where nothing was measured; what it says is what was measured of models of
each kind at its worst, so a plan by it promises too little rather than too much. `figures` is what
`penstock plan` tells: the arithmetic of admission (`costs.Fit`), asked in advance. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.memory.costs import CHUNK_FLOOR, FIRST_ROOM, Fit
from penstock.memory.predict import Scalars, Transient

ACTIVATIONS = 4.2
"""Live copies of a layer's activations in a prefill chunk: at most 4.1 in all that was measured."""
EXPERTS = 1.3
"""The same for the rows that a mixture's experts work on."""
SCORES = {"cpu": 1.06, "cuda": 1.06, "metal": 1.5}
"""Share of one layer's score tensor that exists at once where attention is not fused."""
FUSED = {"metal": (64, 72, 80, 96, 128), "cuda": (64, 72, 80, 96, 128), "cpu": ()}
"""Head sizes with a fused kernel in prefill, for any context and mask."""
DRAW = 16
"""Float32 vectors over the vocabulary that a row's draw may hold: logits, log-probabilities, sorts."""
RULE_CHUNK = 64
"""Ids that the chunked form of a recurrent layer takes at a time."""
SESSIONS = (2_000, 8_000, 32_000, 64_000)


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's config decides how large a step is. `item`: bytes of a number."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    item: int
    experts_per_id: int = 0
    expert_width: int = 0
    state_heads: int = 0
    """Of recurrent layers; 0: there are none."""
    state_width: int = 0
    """Key and value width of such a head together."""
    expanded: int = 0
    """Numbers that one compressed key is expanded to (latent attention)."""
    sinks: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], vocab: int, item: int) -> Shape:
        """From a config.json, whose text model may be one level down. What it does not name is guessed."""
        text = config.get("text_config")
        named = {**config, **text} if isinstance(text, Mapping) else dict(config)

        def first(default: int, *keys: str) -> int:
            found = (named.get(key) for key in keys)
            return next((int(x) for x in found if isinstance(x, int | float) and x > 0), default)

        hidden = first(4096, "hidden_size", "n_embd", "d_model", "dim")
        heads = first(0, "num_attention_heads", "n_head")
        state = first(0, "ssm_state_size", "mamba_d_state", "state_size")
        state_width = state + first(64, "mamba_head_dim", "mamba_d_head", "head_dim")
        if linear_heads := first(0, "linear_num_value_heads"):
            state_width = first(128, "linear_key_head_dim") + first(128, "linear_value_head_dim")
        elif state and not linear_heads:
            linear_heads = first(1, "mamba_num_heads", "mamba_n_heads", "num_heads")
        latent = first(0, "kv_lora_rank")
        return cls(
            hidden=hidden,
            intermediate=first(4 * hidden, "intermediate_size", "n_inner", "ffn_dim"),
            heads=heads,
            kv_heads=first(heads, "num_key_value_heads"),
            head_dim=first(hidden // max(1, heads), "head_dim"),
            vocab=vocab,
            item=item,
            experts_per_id=first(0, "num_experts_per_tok", "num_experts_per_token", "moe_topk"),
            expert_width=first(0, "moe_intermediate_size", "intermediate_size"),
            state_heads=linear_heads,
            state_width=state_width,
            expanded=heads * first(0, "qk_nope_head_dim") + heads * first(0, "v_head_dim") if latent else 0,
            sinks=str(named.get("model_type", "")).startswith("gpt_oss"),
        )


def transient(shape: Shape, backend: str) -> Transient:
    """Start values of the predictor on metal, cuda or cpu, in bytes.

    Layers run one after the other, so an id costs what its costliest layer costs. Activations: 4.2 × (hidden
    + 2 × intermediate + 2 × query width + 2 × key width) numbers. Experts: 1.3 × experts per id × (2 × hidden
    + 3 × expert width). Scores, where no fused kernel runs: query heads a (query, key) pair (three times
    with sinks, twice with latent keys) and a byte of mask; what latent attention expands is spread over the
    shortest chunk's ids.
    Recurrent layers off Metal: float32 work of 12 × (key and value width + 128) a head; as activations on it.
    """
    both = shape.hidden + 2 * shape.intermediate
    attention = ACTIVATIONS * (both + 2 * (shape.heads + shape.kv_heads) * shape.head_dim) * shape.item
    attention += EXPERTS * shape.experts_per_id * (2 * shape.hidden + 3 * shape.expert_width) * shape.item
    inner = shape.state_heads * shape.state_width
    if backend == "metal":
        recurrent = ACTIVATIONS * (both + 4 * inner) * shape.item
    else:
        work = 12 * (inner + shape.state_heads * 2 * RULE_CHUNK)
        recurrent = ACTIVATIONS * both * shape.item + 4 * work
    per_id = max(attention, recurrent if shape.state_heads else 0.0)
    step = Scalars(0.0, 1.25 * per_id + DRAW * 4 * shape.vocab, 1.25 * _pair(shape, backend))
    return Transient(Scalars(0.0, per_id, per_score(shape, backend)), step)


def per_score(shape: Shape, backend: str) -> float:
    """Bytes that a prefill chunk holds of each (query, key) pair; 0 where a fused kernel runs."""
    if not shape.heads or shape.head_dim in FUSED[backend]:
        return 0.0
    return _pair(shape, backend) + 1 + shape.expanded * shape.item / CHUNK_FLOOR


def _pair(shape: Shape, backend: str) -> float:
    copies = 3 if shape.sinks else 2 if shape.expanded else 1
    return SCORES[backend] * copies * shape.heads * shape.item


def figures(
    fit: Fit, *, ceiling: int, weights: int, context: int, most_rows: int, lengths: Sequence[int] = SESSIONS
) -> dict[str, Any]:
    """What `ceiling` bytes hold of a model, by the arithmetic of admission. Bytes and tokens.

    Counted as weights is also what the model keeps once it has run, as far as that was measured. `longest`:
    the longest sequence, prompt and answer, 0 if the model does not fit. Of each session length: how many run
    at once, each with room for 1,024 ids of an answer, and what one of them leaves for cached prompts, in
    tokens.
    """
    weights += fit.transient.constants
    room = ceiling - weights
    longest = fit.longest(room, context) if room > 0 else 0
    sessions = {}
    for length in (n for n in lengths if n + FIRST_ROOM < context):
        count = fit.side_by_side(room, length) if length < longest else 0
        left = max(0, room - fit.together(1, length)) if count else 0
        sessions[str(length)] = {
            "at_once": min(count, most_rows),
            "cache_bytes": left,
            "cache_tokens": left // fit.costs.kv_per_token if fit.costs.kv_per_token else None,
        }
    return {
        "fits": longest > 0,
        "ceiling_bytes": ceiling,
        "weights_bytes": weights,
        "kv_bytes_per_token": fit.costs.kv_per_token,
        "fixed_bytes_per_sequence": fit.costs.row(0),
        "context_length": context,
        "longest": longest,
        "step_bytes_at_longest": fit.alone(longest) - fit.costs.row(longest) if longest else None,
        "sessions": sessions,
    }


def working_set(memory: int) -> int:
    """Metal's recommended working set on a Mac with `memory` bytes: two thirds, from 36 GB on three quarters.

    What `recommendedMaxWorkingSetSize` (Apple, MTLDevice) is on Macs as they are sold, where the sysctl
    iogpu.wired_limit_mb was not set; newer systems may recommend somewhat more.
    """
    return memory * 3 // 4 if memory >= 36_000_000_000 else memory * 2 // 3
