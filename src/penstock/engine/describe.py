"""A model's memory without its weights in memory: `python -m penstock.engine.describe`, for `penstock plan`.

    out   {"backend", "name", "limit", "used"}: the device, as the engine tells it at its start
    in    {"model_path", "ceiling", …} (`Question`): what may be held, and of which machine that is
    out   the figures of `memory.estimate.figures`, or {"problem": one sentence}

Arrays of MLX are lazy: the model is built, its caches are asked for their shapes, and nothing is computed.
Invariant: no parameter is evaluated, so a model larger than the machine can be described.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from penstock.engine import calibrate, device, loader, profile
from penstock.engine.batch import Runner
from penstock.memory import estimate
from penstock.memory.costs import Fit
from penstock.memory.predict import Transient


class Question(msgspec.Struct, frozen=True):
    """What is asked for. `backend`: of the machine that `ceiling` is of; `here`: it is this one."""

    model_path: str
    ceiling: int
    backend: str
    here: bool
    decode_concurrency: int
    prefill_step_size: int
    trust_remote_code: bool = False
    weights: int | None = None
    """Bytes, for a model whose weight files are not in its directory."""
    dtype: str = "bfloat16"
    """What such a model computes in."""


def describe(question: Question) -> dict[str, Any]:
    """The figures. Raises loader.LoadError."""
    directory = Path(question.model_path)
    with loader.problems_of(directory):
        model, config = loader.build(
            directory, trust_remote_code=question.trust_remote_code, files=question.weights is None
        )
        if question.backend == "cpu":
            model.set_dtype(mx.float32)
        elif question.weights is not None:
            model.set_dtype(getattr(mx, question.dtype))
        facts = loader.measure(model, loader.read_configs(directory))
        costs = calibrate.costs_of(Runner(model), question.backend)
    weights = facts.weights_bytes if question.weights is None else question.weights
    measured = _measured(question, config, question.ceiling - weights) if question.here else None
    shape = estimate.Shape.of(config, facts.vocab_size, 4 if question.backend == "cpu" else 2)
    found = estimate.figures(
        Fit(costs, measured or estimate.transient(shape, question.backend)),
        ceiling=question.ceiling,
        weights=weights,
        context=facts.context_length,
        most_rows=question.decode_concurrency,
    )
    return {**found, "model_type": facts.model_type, "steps": "measured" if measured else "estimated"}


def _measured(question: Question, config: Mapping[str, Any], room: int) -> Transient | None:
    """What an engine has measured for this model on this machine, if one has run."""
    keys = (
        profile.fingerprint(config, mode, pipelined, question.prefill_step_size, room)
        for mode in ("ragged", "serial")
        for pipelined in (True, False)
    )
    return next(filter(None, map(profile.load, keys)), None)


def _run() -> int:
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a model's code may print
    answers.write(msgspec.json.encode(device.facts()) + b"\n")
    question = msgspec.json.decode(sys.stdin.readline(), type=Question)
    try:
        found = describe(question)
    except loader.LoadError as problem:
        found = {"problem": str(problem)}
    answers.write(msgspec.json.encode(found) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(_run())
