"""Models between tiny and real: their rows and transients are megabytes, and this CPU still computes them.

The last layer's attention is never computed in prefill (only its keys are kept), so none of these models has
its only full attention there.
"""

from __future__ import annotations

import functools
from typing import Any

from tests.support import tiny_models

from penstock.engine import gated_delta
from penstock.engine.batch import Runner

VOCAB = 2048
_BASE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 256},
    "qwen3_5": {
        "head_dim": 256,
        "num_key_value_heads": 1,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "gemma3_text": {"sliding_window": 128, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64},
    "gpt_oss": {"sliding_window": 128},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 256,
        "kv_lora_rank": 128,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "qk_nope_head_dim": 64,
    },
    "mamba2": {"num_heads": 8, "head_dim": 64, "intermediate_size": 512, "state_size": 64},
}
NAMES = tuple(_CHANGES)


def config_of(name: str, **more: Any) -> dict[str, Any]:
    """A config of the architecture `name` at this scale."""
    changes = {**_BASE, **_CHANGES[name], **more}
    if name == "mamba2":
        for key in ("num_attention_heads", "num_key_value_heads"):
            changes.pop(key)
    return tiny_models.config_of(name, **changes)


@functools.cache
def runner(name: str, **more: Any) -> Runner:
    """A runner of such a model with random weights, with the chunked gated delta rule as in service."""
    gated_delta.install()
    made = Runner(tiny_models.make(config_of(name, **more)))
    assert made.mode == "ragged"
    return made
