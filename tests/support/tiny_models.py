"""Tiny models with random weights, through mlx-lm's own classes: a few thousand numbers, all the structure.

`build` gives a model in memory, `write_model_dir` a directory the whole server can serve. Weights are scaled
until 64 greedy tokens hold at least `DISTINCT` different ones: a model that repeats itself would pass any
comparison of texts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

import penstock.engine  # noqa: F401 - makes the imports of mlx_lm below light

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<pad>",
]
VOCAB = 256 + len(SPECIAL)
END_OF_TURN = 256 + SPECIAL.index("<|im_end|>")
WINDOW = 24
DISTINCT = 20

_BASE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": END_OF_TURN,
}
_QWEN3_5_TEXT = _BASE | {
    "model_type": "qwen3_5_text",
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "rope_parameters": {
        "type": "default",
        "mrope_section": [1, 1, 0],
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": _BASE,
    "llama": _BASE,
    "qwen3_5": {"text_config": _QWEN3_5_TEXT, "eos_token_id": END_OF_TURN},
    "gemma3_text": _BASE
    | {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "qwen3_moe": _BASE
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gpt_oss": _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "deepseek_v3": _BASE
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "state_size": 16,
        "num_hidden_layers": 3,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 1000.0],
        "time_step_rank": "auto",
        "tie_word_embeddings": False,
        "eos_token_id": END_OF_TURN,
    },
    "falcon_h1": _BASE
    | {
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "mamba_expand": 1,
    },
    "gemma2": _BASE | {"query_pre_attn_scalar": 16},
    "llama4": {
        "text_config": _BASE
        | {
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "use_qk_norm": True,
            "rope_scaling": None,
        },
    },
}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A config.json of the architecture `name`, with `changes` to the text model's part."""
    config = {"model_type": name, **copy.deepcopy(CONFIGS[name])}
    config.get("text_config", config).update(changes)
    return config


@functools.cache
def build(name: str, seed: int = 0) -> Any:
    """A model of the architecture `name`, float32, evaluated, lively (see above); one per name and seed."""
    for scale in (2.0, 3.0, 4.0, 1.5, 1.0, 6.0):
        model = make(config_of(name), seed, scale)
        if len(set(greedy(model, range(3, 11), 64))) >= DISTINCT:
            return model
    raise AssertionError(f"no scale makes {name} with seed {seed} lively")


def make(config: dict[str, Any], seed: int = 0, scale: float = 1.0, dtype: mx.Dtype = mx.float32) -> Any:
    """A model of this config with random weights; matrices are scaled, norms and biases are not."""
    architecture = importlib.import_module("mlx_lm.models." + config["model_type"])
    mx.random.seed(seed)
    model = architecture.Model(architecture.ModelArgs.from_dict(copy.deepcopy(config)))

    def spread(path: str, weight: mx.array) -> mx.array:
        if path.endswith(("sinks", "e_score_correction_bias")) or (weight.ndim > 1 and mx.all(weight == 0)):
            return mx.random.normal(weight.shape) * 0.3
        return (weight * scale if weight.ndim > 1 else weight).astype(dtype)

    model.update(tree_map_with_path(spread, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def greedy(model: Any, prompt: Any, count: int) -> list[int]:
    """`count` greedy tokens by the plain model loop."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    tokens: list[int] = []
    ids = list(prompt)
    for _ in range(count):
        tokens.append(int(mx.argmax(model(mx.array([ids]), cache=cache)[0, -1]).item()))
        ids = tokens[-1:]
    return tokens


@contextlib.contextmanager
def exact_sizes() -> Iterator[None]:
    """No pool of freed buffers, from which an array may get a larger one than it needs."""
    limit = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)


def reference(model: Any, prompt: Sequence[int], count: int) -> tuple[list[int], mx.array]:
    """`count` greedy tokens by mlx-lm's own `generate_step`, and all log-probs (count, V) of each step."""
    from mlx_lm.generate import generate_step

    steps = [*generate_step(mx.array(prompt), model, max_tokens=count)]
    logprobs = mx.stack([logprobs for _, logprobs in steps])
    mx.eval(logprobs)
    return [int(token) for token, _ in steps], logprobs


TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_model_dir(path: Path, name: str = "qwen3", seed: int = 0) -> Path:
    """Write `build(name, seed)` with its config and a byte-level tokenizer (ChatML template) to `path`."""
    model = build(name, seed)
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (path / "config.json").write_text(json.dumps(config_of(name), indent=1))
    write_tokenizer(path)
    return path


def byte_pieces() -> list[bytes]:
    """The byte of each of the tokenizer's first 256 ids."""
    from tokenizers import pre_tokenizers

    from penstock.pieces import reading

    _, to_bytes = reading({"type": "ByteLevel"})
    assert to_bytes is not None
    return [to_bytes(character) for character in sorted(pre_tokenizers.ByteLevel.alphabet())]


def write_tokenizer(path: Path) -> None:
    """A tokenizer of 256 bytes and the special tokens, with files as the hub has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
