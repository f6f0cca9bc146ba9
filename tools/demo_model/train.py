"""Trains the demo model with MLX, on a GPU or (slowly) on CPUs. Seeded; no other framework.

A batch is windows of the documentation at random places and conversation rows in order.
Weights are kept in float32; ``compute`` says in which type the forward pass runs.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn
from mlx.utils import tree_map
from tools.demo_model import shape

from penstock.engine import gated_delta


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training run is: with the same data file, the same plan gives the same model."""

    steps: int
    seed: int
    peak: float
    warmup: int
    talk_share: float
    listen_weight: float
    read_weight: float = 1.0
    rows: int = 32
    length: int = 1024
    decay: float = 0.05
    clip: float = 1.0
    compute: str = "bfloat16"


READING = Plan(steps=2140, seed=7, peak=3e-3, warmup=200, talk_share=0.5, listen_weight=0.1)
"""First phase: mostly learns to read, half of each batch is documentation."""

TALKING = Plan(
    steps=1450, seed=8, peak=1.5e-3, warmup=50, talk_share=0.75, listen_weight=0.05, read_weight=0.3
)
"""Second phase, from the first one's weights: most of the loss is in what the assistant says."""


class _Taps(nn.Module):  # type: ignore[misc]
    """The depthwise convolution as a sum of shifted products: it needs no convolution gradient."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        taps = self.weight.shape[1]
        length = x.shape[1] - taps + 1
        total = x[:, :length] * self.weight[:, 0, 0]
        for i in range(1, taps):
            total = total + x[:, i : i + length] * self.weight[:, i, 0]
        return total


class Batches:
    """Draws training batches and held-out windows from the data file."""

    def __init__(self, path: Path, plan: Plan) -> None:
        data = np.load(path)
        self._docs, self._held, self._ids, self._spoken = (
            data[name] for name in ("docs", "held_out", "ids", "spoken")
        )
        self._plan = plan
        self._random = np.random.default_rng(plan.seed)
        self._row = 0

    def next(self) -> tuple[mx.array, mx.array]:
        """(rows, length + 1) ids and their loss weights."""
        talk = int(self._plan.rows * self._plan.talk_share)
        ids, weights = self._windows(self._docs, self._plan.rows - talk)
        rows = np.arange(self._row, self._row + talk) % len(self._ids)
        self._row = int(rows[-1]) + 1
        said = self._spoken[rows].astype(np.float32)
        said = said + (1 - said) * self._plan.listen_weight
        both = np.concatenate([ids, self._ids[rows]])
        weights = np.concatenate([weights * self._plan.read_weight, said])
        return mx.array(both.astype(np.int32)), mx.array(weights)

    def held_out(self) -> mx.array:
        """A fixed set of held-out windows."""
        length = self._plan.length + 1
        starts = np.linspace(0, len(self._held) - length - 1, 32).astype(int)
        return mx.array(np.stack([self._held[s : s + length] for s in starts]).astype(np.int32))

    def _windows(self, stream: Any, count: int) -> tuple[Any, Any]:
        length = self._plan.length + 1
        starts = self._random.integers(0, len(stream) - length, count)
        ids = np.stack([stream[s : s + length] for s in starts])
        return ids, np.ones(ids.shape, dtype=np.float32)


def run(data: Path, out: Path, plan: Plan, start: Path | None = None) -> None:
    """Train by the plan, from the weights in the folder ``start`` if given, and save to ``out``."""
    gated_delta.install()
    mx.random.seed(plan.seed)
    batches = Batches(data, plan)
    model = shape.build()
    if start:
        model.load_weights(str(start / "model.safetensors"))
        shape.in_float32(model)
    for layer in model.layers:
        if layer.is_linear:
            layer.linear_attn.conv1d = _Taps(layer.linear_attn.conv1d.weight)
    model.train()
    print(f"{shape.parameters(model):,} parameters, device {mx.default_device()}, {plan}", flush=True)
    optimizer = optim.AdamW(learning_rate=0.0, betas=[0.9, 0.97], weight_decay=plan.decay)
    step = _step(model, optimizer, plan)
    started = time.perf_counter()
    recent = []
    for n in range(plan.steps):
        optimizer.learning_rate = mx.array(_rate(n, plan))
        loss = step(*batches.next())
        mx.eval(loss, model.state, optimizer.state)
        recent.append(loss.item())
        if n % 100 == 99 or n < 3:
            spent = time.perf_counter() - started
            print(f"step {n + 1} loss {sum(recent) / len(recent):.4f} at {spent:.0f} s", flush=True)
            recent.clear()
        if n % 500 == 499:
            shape.save(model, out)
    shape.save(model, out)
    spent = time.perf_counter() - started
    print(f"{plan.steps} steps in {spent:.0f} s, held-out loss {_held_out_loss(model, batches):.4f} a token")


def _rate(n: int, plan: Plan) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if n < plan.warmup:
        return plan.peak * (n + 1) / plan.warmup
    along = (n - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


def _step(model: nn.Module, optimizer: optim.Optimizer, plan: Plan) -> Any:
    compute = getattr(mx, plan.compute)

    def loss(weights: dict[str, Any], ids: mx.array, emphasis: mx.array) -> mx.array:
        model.update(tree_map(lambda w: w.astype(compute), weights))
        logits = model(ids[:, :-1]).astype(mx.float32)
        each = nn.losses.cross_entropy(logits, ids[:, 1:])
        mean: mx.array = (each * emphasis[:, 1:]).sum() / emphasis[:, 1:].sum()
        return mean

    # Not under mx.compile: on CUDA the fused kernels of this graph take minutes to build.
    def step(ids: mx.array, emphasis: mx.array) -> mx.array:
        weights = model.trainable_parameters()
        value, gradient = mx.value_and_grad(loss)(weights, ids, emphasis)
        gradient, _ = optim.clip_grad_norm(gradient, plan.clip)
        model.update(optimizer.apply_gradients(gradient, weights))
        return value

    return step


def _held_out_loss(model: nn.Module, batches: Batches) -> float:
    ids = batches.held_out()
    total = 0.0
    for part in mx.split(ids, 4):
        total += nn.losses.cross_entropy(model(part[:, :-1]), part[:, 1:], reduction="mean").item()
    return total / 4
