"""From a model directory to a model in memory, and the facts about it that the rest counts with.

Owns loading through mlx-lm's public `load_model`, and the conversion to float32 on the CPU back end, where
bfloat16 matmuls are many times slower and mixtures of experts exist in float32 only.
Refuses a model with one sentence (`LoadError`). Invariant: what `facts` says is measured on the model's own
caches and arrays, not derived from its config, but for what only the config can know.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from penstock.engine import lean, seams
from penstock.engine.rows import Row

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
)

NO_LIMIT = 1 << 20


class LoadError(Exception):
    """The model can't be served, in one sentence; loading it again would end the same way."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the scheduler and the clients are told about the model."""

    model_type: str
    context_length: int
    """Positions the model was made for, as its config says; `NO_LIMIT` where that is silent (recurrent)."""
    eos_ids: frozenset[int]
    vocab_size: int
    """Width of the logits, which may exceed the tokenizer's vocabulary."""
    weights_bytes: int
    """By the arrays' shapes, in memory or not."""
    windows: tuple[int, ...]
    """The different window sizes, in positions."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to compute, with its config as mlx-lm read it."""

    model: Any
    config: dict[str, Any]
    facts: ModelFacts


def load(
    path: str | Path, *, trust_remote_code: bool = False, beat: Callable[[], object] = lambda: None
) -> Loaded:
    """Load the model in the directory `path`, all weights in memory. Raises LoadError.

    `beat` is called whenever an array is there: a slow disk may take many minutes for all of them.
    """
    directory = Path(path)
    with problems_of(directory):
        model, config = build(directory, trust_remote_code=trust_remote_code)
        if mx.default_device() == mx.cpu:
            model.set_dtype(mx.float32)
        arrays = [array for _, array in tree_flatten(model.parameters())]
        for array in arrays:
            mx.async_eval(array)  # type: ignore[no-untyped-call]
        for array in arrays:
            mx.eval(array)
            beat()
        return Loaded(model, config, measure(model, read_configs(directory)))


def build(
    directory: Path, *, trust_remote_code: bool = False, files: bool = True
) -> tuple[Any, dict[str, Any]]:
    """The model and its config, no weight in memory yet: MLX reads a file when an array is first computed.

    `files` False: from config.json alone, with weights drawn when they are first computed.
    """
    seams.install()
    if not mx.metal.is_available():
        from penstock.engine import gated_delta

        gated_delta.install()
    utils = lean.utils()
    if files:
        model, config = utils.load_model(directory, lazy=True, trust_remote_code=trust_remote_code)
    else:
        config = utils.load_config(directory)
        model_class, arguments = utils._get_classes(config)
        model = model_class(arguments.from_dict(config))
    return model, config


@contextmanager
def problems_of(directory: Path) -> Iterator[None]:
    """Whatever goes wrong with the model in `directory` becomes a LoadError of one sentence."""
    if not (directory / "config.json").is_file():
        raise LoadError(f"{directory} is not a model directory: it has no config.json.")
    try:
        yield
    except (Exception, SystemExit) as error:
        raise LoadError(_sentence(directory, error)) from error


def measure(model: Any, configs: Iterable[Mapping[str, Any]] = ()) -> ModelFacts:
    """The facts of a model, in memory or not; `configs` in order of precedence, the main one first.

    They come from one step that is built and never computed: shapes are known before.
    """
    configs = list(configs)
    row = Row(make_prompt_cache(model), 1)
    logits = model(mx.zeros((1, 1), mx.int32), cache=row.caches)
    windows = {leaf.max_size for leaf in row.leaves if isinstance(leaf, RotatingKVCache)}
    return ModelFacts(
        model_type=str(getattr(model, "model_type", "")),
        context_length=_context_length(configs),
        eos_ids=_eos_ids(configs),
        vocab_size=int(logits.shape[-1]),
        weights_bytes=sum(int(x.nbytes) for _, x in tree_flatten(model.parameters())),
        windows=tuple(sorted(windows)),
    )


def read_configs(directory: Path) -> list[dict[str, Any]]:
    """generation_config.json and config.json, each followed by its text_config; unreadable ones are empty."""
    found: list[dict[str, Any]] = []
    for name in ("generation_config.json", "config.json"):
        try:
            config = json.loads((directory / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            found += [config, *(inner for inner in [config.get("text_config")] if isinstance(inner, dict))]
    return found


def _context_length(configs: Iterable[Mapping[str, Any]]) -> int:
    values = (config.get(key) for config in configs for key in _CONTEXT_KEYS)
    return next((int(value) for value in values if isinstance(value, int | float) and value > 0), NO_LIMIT)


def _eos_ids(configs: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    ids: set[int] = set()
    for config in configs:
        named = config.get("eos_token_id")
        ids.update(x for x in (named if isinstance(named, list) else [named]) if type(x) is int)
    return frozenset(ids)


def _sentence(directory: Path, error: BaseException) -> str:
    """Why `directory` can't be served, from what mlx-lm raised."""
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:240]
    match error:
        case FileNotFoundError():
            words = f"{directory} holds no weights (model*.safetensors)"
        case SystemExit() | ImportError():
            words = f"the code of {directory.name}'s architecture needs a package that is not installed"
        case ValueError() if detail.startswith("Model type"):
            name = detail.removeprefix("Model type ").removesuffix(" not supported")
            words = f"mlx-lm {version('mlx-lm')} does not know the architecture '{name}' of {directory}"
        case ValueError() if "trust_remote_code" in detail or "requires importing" in detail:
            words = f"{directory} brings its own model code, which only --trust-remote-code would run"
        case ValueError() if "parameters" in detail or "shape" in detail:
            words = f"the weights in {directory} don't fit its config.json: {detail}"
        case RuntimeError() | OSError():
            words = f"the weights in {directory} can't be read: {detail}"
        case KeyError():
            words = f"the config.json in {directory} lacks {detail}"
        case _:
            words = f"mlx-lm can't build the model in {directory}: {detail}"
    return f"{words}."
