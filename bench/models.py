"""Random models for measuring: model directories that mlx_lm.server and penstock both load.

Owns the shapes and the tokenizer: every id a model can answer with is a space and two letters, so each
generated id is three characters of text at once and a prompt of N words is exactly N ids. Refuses nothing
else: weights are drawn, not learned, and an end-of-turn id is never the likeliest.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path
from typing import Any

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [first + second for first in string.ascii_lowercase for second in string.ascii_lowercase]
BYTES = 256
FIRST_WORD = BYTES + len(string.ascii_lowercase)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_QWEN3_5_TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 8,
    "vocab_size": 1024,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "type": "default",
        "mrope_section": [11, 11, 10],
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
}
_QWEN3_5: dict[str, Any] = {
    "model_type": "qwen3_5",
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        **_QWEN3,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "intermediate_size": 768,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 1024,
    },
    # A chunk of 256 ids takes a CPU a fraction of the stall target, also behind thousands of others.
    "small": {
        **_QWEN3,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 1024,
    },
    "hybrid": {
        **_QWEN3_5,
        "text_config": {
            **_QWEN3_5_TEXT,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    },
    # As the reported model: 32 KB of KV per token (float32, two layers), head_dim 256, small else.
    "report": {
        **_QWEN3_5,
        "text_config": {
            **_QWEN3_5_TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    },
    # 131 KB of KV per token (float32, four layers), small else.
    "wide-kv": {
        **_QWEN3,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 1024,
    },
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "quantization": {"group_size": 64, "bits": 8},
    },
}
SHAPES["qwen3-4b-long"] = {**SHAPES["qwen3-4b"], "max_position_embeddings": 131072}


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE whose merges make every ' xy' (x, y letters) one id; ChatML as the template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + ["Ġ" + c for c in string.ascii_lowercase] + ["Ġ" + w for w in WORDS]
    merges = [("Ġ", c) for c in string.ascii_lowercase] + [("Ġ" + w[0], w[1]) for w in WORDS]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 40960,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    eos = len(tokens) + SPECIALS.index("<|im_end|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def prompt_text(words: int, seed: int) -> str:
    """Text of exactly `words` ids (a leading space included), different from the first word on per seed."""
    import random

    draw = random.Random(seed)
    return "".join(" " + draw.choice(WORDS) for _ in range(words))


def write_model_dir(
    directory: Path, shape: str | dict[str, Any], dtype: str = "float32", seed: int = 0
) -> Path:
    """Draws a model of the given shape into `directory` (unless it is there already) and returns it.

    `shape`: the name of one, or a config.json with room for this tokenizer's ids. Weights are mlx-lm's own
    initialisation; the head's rows of ids that are not words are zero, so that a greedy answer never ends by
    itself and never holds half a character.
    """
    if (directory / "model.safetensors").exists():
        return directory
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    eos = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    config = {**(SHAPES[shape] if isinstance(shape, str) else shape), "eos_token_id": eos}
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    kind = getattr(mx, dtype)
    model.update(
        tree_map(lambda a: a.astype(kind) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    )
    head = getattr(model, "language_model", model).lm_head
    ids = mx.arange(head.weight.shape[0])[:, None]
    words = (ids >= FIRST_WORD) & (ids < FIRST_WORD + len(WORDS))
    head.weight = mx.where(words, head.weight, mx.zeros_like(head.weight))
    if "quantization" in config:
        nn.quantize(model, **config["quantization"])
    mx.eval(model.parameters())
    mx.save_safetensors(
        str(directory / "config.tmp.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "config.tmp.safetensors").rename(directory / "model.safetensors")
    return directory


def main() -> None:
    """`python -m bench.models SHAPE DIRECTORY [--dtype bfloat16]`, in a process of its own for its memory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    write_model_dir(args.directory, args.shape, args.dtype)


if __name__ == "__main__":
    main()
