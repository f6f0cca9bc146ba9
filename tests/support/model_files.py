"""A model of any config, written as files that the whole program loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tests.support import tiny_models


def write(path: Path, config: dict[str, Any]) -> Path:
    """Random weights of `config` in `path`, with the byte tokenizer of the tiny models."""
    path.mkdir(parents=True, exist_ok=True)
    model = tiny_models.make(config)
    mx.save_safetensors(
        str(path / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (path / "config.json").write_text(json.dumps(config))
    tiny_models.write_tokenizer(path)
    return path
