"""The models that storms run over: small ones for CPUs, and layers of real ones for a GPU, all drawn."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from tests.support import scaled_models

from bench import models as bench_models
from penstock.engine import device, gated_delta
from penstock.engine.batch import Runner
from penstock.memory import estimate

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32},
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 32},
    "qwen3_5": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 2,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
}
"""A dense model, a mixture of experts, a hybrid with head_dim 256."""


@dataclass(frozen=True)
class Subject:
    """A model to run, and what the engine has to know of it."""

    runner: Runner
    vocab: int
    context: int
    room: int
    """Bytes that calibration may use."""
    words: str = ""
    per_score: float = 0.0
    """What attention must be expected to hold of a (query, key) pair, in bytes: as the server does."""

    @property
    def weights(self) -> int:
        """Bytes."""
        return sum(int(array.nbytes) for _, array in tree_flatten(self.runner._model.parameters()))


def small(name: str, context: int = 8_192) -> Subject:
    """One of `SHAPES` in float32, alone in memory: what other tests keep would count as its weights."""
    scaled_models.runner.cache_clear()
    gc.collect()
    runner = scaled_models.runner(name, **SHAPES[name])
    score = _per_score(scaled_models.config_of(name, **SHAPES[name]), scaled_models.VOCAB)
    return Subject(runner, scaled_models.VOCAB, context, 4 << 30, name, score)


def _per_score(config: dict[str, Any], vocab: int) -> float:
    backend = device.backend()
    return estimate.per_score(estimate.Shape.of(config, vocab, 4 if backend == "cpu" else 2), backend)


_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
_HYBRID: dict[str, Any] = {
    "model_type": "qwen3_5",
    "text_config": {
        **bench_models.SHAPES["hybrid"]["text_config"],
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "intermediate_size": 9216,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248_320,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": True,
    },
}
LARGE: dict[str, tuple[dict[str, Any], int, int]] = {
    # config, layers by default, longest chunk
    "dense": (bench_models.SHAPES["qwen3-4b-long"], 12, 8_192),
    "hybrid": (_HYBRID, 16, 2_048),
    "moe": (_MOE, 8, 4_096),
}
"""Qwen3-4B, Qwen3.5-4B and Qwen3-30B-A3B by their shapes, fewer layers. Dense models need long chunks for a
large transient: their attention keeps no scores. With 8 experts for each of 8,192 ids MLX's CUDA kernel for
experts can't be launched."""
TOYS = {"dense": "qwen3", "hybrid": "qwen3_5", "moe": "qwen3_moe"}


def large(name: str, layers: int | None, context: int, room: int) -> Subject:
    """One of `LARGE` in 8 bits over bfloat16. Raises RuntimeError where the back end can't run it."""
    config, usual, _ = LARGE[name]
    count = layers or usual
    inner = config.get("text_config", config)
    changed = {**inner, "num_hidden_layers": count, "max_position_embeddings": context}
    config = {**config, "text_config": changed} if "text_config" in config else changed
    return _drawn(name, config, mx.bfloat16, context, room)


def toy(name: str, context: int) -> Subject:
    """The small shape of the same kind, in 8 bits, to try a storm of `large` ones where there is no GPU."""
    config = scaled_models.config_of(TOYS[name], **SHAPES[TOYS[name]])
    return _drawn(name, config, mx.float32, context, 4 << 30)


def _drawn(name: str, config: dict[str, Any], dtype: mx.Dtype, context: int, room: int) -> Subject:
    """In 8 bits, the experts too where the back end multiplies those."""
    problems: list[str] = []
    for bits, quantised in (("8 bits", _all), ("8 bits, experts unquantised", _no_experts)):
        runner = Runner(_model(config, dtype, quantised))
        try:
            _try(runner)
        except (RuntimeError, ValueError) as error:
            problems.append(f"{bits}: {str(error).splitlines()[0][:200]}")
            runner.reset()
            del runner
            mx.clear_cache()
            continue
        inner = config.get("text_config", config)
        words = f"{name}, {inner['num_hidden_layers']} layers, {bits}, {dtype} else, {runner.mode}"
        vocab, told = inner["vocab_size"], "; ".join([words, *problems])
        return Subject(runner, vocab, context, room, told, _per_score(config, vocab))
    raise RuntimeError("; ".join(problems))


def _all(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized")


def _no_experts(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and "switch_mlp" not in path


def _model(config: dict[str, Any], dtype: mx.Dtype, quantised: Callable[[str, nn.Module], bool]) -> Any:
    if not mx.metal.is_available():
        gated_delta.install()
    architecture = importlib.import_module("mlx_lm.models." + config["model_type"])
    mx.random.seed(0)
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    model.update(
        tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
    )
    for layer in model.layers:  # one after the other: a model as it was drawn is several times larger
        mx.eval(layer.parameters())
        nn.quantize(layer, group_size=64, bits=8, class_predicate=quantised)
        mx.eval(layer.parameters())
        mx.clear_cache()
    nn.quantize(model, group_size=64, bits=8, class_predicate=_rest(quantised))
    model.eval()
    mx.eval([array for _, array in tree_flatten(model.parameters())])
    mx.clear_cache()
    return model


def _rest(quantised: Callable[[str, nn.Module], bool]) -> Callable[[str, nn.Module], bool]:
    return lambda path, module: ".layers." not in f".{path}." and quantised(path, module)


def _try(runner: Runner) -> None:
    """A chunk and a decode step of two rows, so that what cannot run is known before the storm."""
    rows = [runner.open(64) for _ in range(2)]
    for row in rows:
        mx.eval(runner.prefill(row, list(range(1, 33))))
    mx.eval(runner.decode(rows, mx.array([1, 2])))
    mx.synchronize()
    for row in rows:
        runner.close(row)
    mx.clear_cache()
