"""The demo model's shape: the config that mlx-lm loads, and its first weights.

Small, but with every trait of its big relatives that a server has to handle: recurrent layers with
twice as many value heads as key heads, every fourth layer with full attention, grouped KV heads,
gated attention output, partial rotary positions, tied embeddings.
"""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.qwen3_5 import Model, ModelArgs
from tools.demo_model.tokenizer import SIZE

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5",
    "dtype": "bfloat16",
    "vocab_size": SIZE,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"type": "default", "rope_theta": 100000, "partial_rotary_factor": 0.25},
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build() -> Model:
    """A new model with float32 weights from MLX's current random state."""
    model = Model(ModelArgs.from_dict(json.loads(json.dumps(CONFIG))))
    shrink = 1 / math.sqrt(2 * CONFIG["num_hidden_layers"])
    for layer in model.layers:
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * shrink
        if not layer.is_linear:
            layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * shrink
            continue
        mixer = layer.linear_attn
        mixer.out_proj.weight = mixer.out_proj.weight * shrink
        # Time steps log-uniform in [0.001, 0.1]: some heads forget within a few tokens, some hardly ever.
        step = mx.exp(mx.random.uniform(math.log(0.001), math.log(0.1), (mixer.num_v_heads,)))
        mixer.dt_bias = step + mx.log(-mx.expm1(-step))
        mixer.A_log = mx.log(mx.random.uniform(1, 16, (mixer.num_v_heads,)))
    return model


def parameters(model: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.size for _, weight in tree_flatten(model.parameters()))


def save(model: nn.Module, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights in bfloat16 (A_log in float32)."""
    keep = model.cast_predicate
    weights = {
        name: weight.astype(mx.bfloat16 if keep(name) else mx.float32)
        for name, weight in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {"eos_token_id": [CONFIG["eos_token_id"], 0], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def rounded(model: nn.Module) -> None:
    """Round the weights to bfloat16 in place and keep computing in float32, as the server does on CPUs."""
    keep = model.cast_predicate
    weights = [
        (name, weight.astype(mx.bfloat16).astype(mx.float32) if keep(name) else weight)
        for name, weight in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)


def in_float32(model: nn.Module) -> None:
    """Turn loaded bfloat16 weights into float32 (the same numbers)."""
    model.update(tree_map(lambda weight: weight.astype(mx.float32), model.parameters()))
