"""Storms: random traffic over a real model in a tight budget, each step's memory measured and compared.

Two ways to run one. Pipelined, as in service: peaks between two reads hold parts of two steps, so only the
bound can be checked. Not pipelined: a peak belongs to one step, so it is compared with what was predicted for
that step, by kind. The allocator's own counters are read around the loop's `_launch` and `_observe`.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from tests.support import scaled_models
from tests.support.engine_loop import EngineLoop

from penstock import wire
from penstock.engine import calibrate, sequence
from penstock.memory.audit import TOLERANCE
from penstock.memory.costs import Fit
from penstock.memory.ledger import Account
from penstock.memory.predict import Transient

CONTEXT = 8_192
PLENTY = 4 << 30
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

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 30, "logprobs": 5},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1, "repetition_penalty": 1.1},
]


@dataclass
class Launch:
    """What was planned, and what the engine held then."""

    kind: str
    predicted: int
    budget: int
    alone: bool
    active: int
    lasting: int
    """Under lease beside the pool and transients."""


@dataclass
class Record:
    """What a storm has shown."""

    steps: int = 0
    ratios: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """By kind: (measured ÷ predicted, measured bytes)."""
    largest_share: float = 0.0
    """Of the budget, held by one step's transient."""
    in_use: list[float] = field(default_factory=list)
    """Shares of the budget that were leased when a step was launched while a request waited."""
    tightest: float = 0.0
    """Peak ÷ bound."""
    counts: Counter[str] = field(default_factory=Counter)
    chunk_lengths: set[int] = field(default_factory=set)
    longest_context: int = 0

    def lines(self) -> list[str]:
        found = [
            f"{self.steps} steps, peak at most {self.tightest:.3f} of the bound, transient at most "
            f"{self.largest_share:.2f} of the budget, {len(self.chunk_lengths)} chunk lengths, "
            f"context to {self.longest_context}, {dict(self.counts)}"
        ]
        if self.in_use:
            found.append(f"in use while requests wait: median {statistics.median(self.in_use):.2f}")
        for kind, ratios in sorted(self.ratios.items()):
            worst, median = max(r for r, _ in ratios), statistics.median(r for r, _ in ratios)
            found.append(f"{kind:14s} {len(ratios):5d} × worst {worst:.2f} median {median:.2f}")
        return found

    def median_of_big_chunks(self) -> float:
        big = [
            r for kind, all_ in self.ratios.items() if "prefill" in kind for r, size in all_ if size > 10e6
        ]
        return statistics.median(big)

    def worst(self) -> float:
        return max(ratio for ratios in self.ratios.values() for ratio, _ in ratios)


class Storm:
    """One model, one budget, one seed."""

    def __init__(
        self,
        name: str,
        *,
        seed: int = 0,
        share: float = 1.5,
        pipelined: bool = True,
        cache: bool = False,
        transient: Transient | None = None,
        longest: int = 1024,
    ) -> None:
        """`share`: the budget as a multiple of what the longest sequence needs alone."""
        self.random = random.Random(seed)
        self.runner = scaled_models.runner(name, **SHAPES[name])
        self.transient = transient or calibrate.calibrate(
            self.runner, scaled_models.VOCAB, room=PLENTY, context_length=CONTEXT, longest=longest
        )
        costs = calibrate.costs_of(self.runner)
        mx.synchronize()
        mx.clear_cache()
        self.weights = mx.get_active_memory()
        self.alone = Fit(costs, self.transient).alone(CONTEXT)
        self.ceiling = self.weights + int(share * self.alone)
        self.engine = EngineLoop(
            self.runner,
            vocab_size=scaled_models.VOCAB,
            context_length=CONTEXT,
            pipelined=pipelined,
            weights=self.weights,
            ceiling=self.ceiling,
            cache_bytes=None if cache else 0,
            transient=self.transient,
            chunk_longest=longest,
            decode_concurrency=12,
            prompt_concurrency=4,
            stall_target=1e9,
        )
        self.record = Record()
        self.bound = 1.0
        self.pool = 0
        self.launches: list[Launch] = []
        self._watch()

    # -- measuring -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        loop, accounts = self.engine.loop, self.engine.accounts
        launch, observe, set_pool = loop._launch, loop._observe, accounts.set_pool
        self.pool = accounts.ledger.balance(Account.POOL)

        def watched_pool(limit: int) -> None:
            self.pool = max(self.pool, limit)
            set_pool(limit)

        def watched_launch(plan: Any) -> Any:
            if not self.launches:
                mx.reset_peak_memory()
                self.pool = accounts.ledger.balance(Account.POOL)
            self.launches.append(self._planned(plan))
            return launch(plan)

        def watched_observe(step: Any) -> None:
            self._compare(mx.get_peak_memory())
            observe(step)
            self.pool = accounts.ledger.balance(Account.POOL)

        loop._launch, loop._observe, accounts.set_pool = watched_launch, watched_observe, watched_pool  # type: ignore[method-assign]

    def _planned(self, plan: Any) -> Launch:
        loop, ledger = self.engine.loop, self.engine.accounts.ledger
        on_board = [s for s in loop.sequences.values() if s.row is not None]
        parts = ["growth"] if plan.grow else []
        if plan.chunk is not None:
            parts.append(f"prefill {10 * plan.chunk.sequence.launched // (CONTEXT + 1)}")
            self.record.chunk_lengths.add(plan.chunk.length)
            self.record.longest_context = max(
                self.record.longest_context, plan.chunk.sequence.launched + plan.chunk.length
            )
            self.record.counts["shortened"] += plan.chunk.decided_by == "memory"
        if plan.decode:
            changed = tuple(s.id for s in plan.decode) != loop.facts.stacked
            parts.append("regroup" if changed and loop.facts.costs.states else "decode")
        self.record.largest_share = max(self.record.largest_share, plan.transient / ledger.budget)
        waiting = len(loop.sequences) > len(on_board)
        self.record.counts["waits"] += waiting
        if waiting and len(on_board) < loop.facts.decode_concurrency:
            self.record.in_use.append((ledger.held + plan.transient) / ledger.budget)
        return Launch(
            " + ".join(parts),
            plan.transient,
            ledger.budget,
            len(on_board) == 1,
            int(mx.get_active_memory()),
            self.engine.accounts.lasting,
        )

    def _compare(self, peak: int) -> None:
        """Peak and pool since the last read, against the budgets of the steps that ran since then."""
        bound = max(self.ceiling if launch.alone else launch.budget for launch in self.launches)
        share = (peak + self.pool) / bound
        assert share <= self.bound, f"{peak} and a pool of {self.pool} in {bound}: {self.launches}"
        self.record.tightest = max(self.record.tightest, share)
        self.record.steps += 1
        step = self.launches.pop(0)
        if not self.engine.loop.pipelined:
            active = int(mx.get_active_memory())
            lasting = self.engine.accounts.lasting
            assert active <= lasting + TOLERANCE, "something lasts that is not leased"
            leased = max(step.lasting, lasting) + step.predicted + TOLERANCE
            assert peak <= leased * self.bound, "the step held more than was leased"
            measured = max(0, peak - max(step.active, active))
            self.record.ratios[step.kind].append((measured / max(1, step.predicted), measured))

    # -- traffic -------------------------------------------------------------------------------------

    def run(self, steps: int, *, traffic: bool = True) -> Record:
        """Traffic until that many steps were computed, then everything is ended.

        Without `traffic` only what was submitted before, to its end or to that many steps.
        """
        first_room, sequence.FIRST_ROOM = sequence.FIRST_ROOM, 32  # rows grow early, and often
        try:
            while self.record.steps < steps and (traffic or self._open()):
                if traffic:
                    self._disturb()
                self.engine.turn()
            self._budget(self.ceiling)
            for id_ in list(self.engine.loop.sequences):
                self.engine.end(id_)
            for _ in range(4):
                self.engine.turn()
            self.record.counts.update(self.engine.loop.counts)
            self.engine.close()
            return self.record
        finally:
            sequence.FIRST_ROOM = first_room
            mx.set_cache_limit(PLENTY)

    def _open(self) -> bool:
        return bool(self.engine.channel.inbox or self.engine.loop.sequences)

    def _disturb(self) -> None:
        draw = self.random.random
        alive = list(self.engine.loop.sequences.values())
        if len(alive) < 10:
            self._submit()
        if alive and draw() < 0.01:
            self.engine.end(self.random.choice(alive).id)
        if draw() < 0.05:
            least = self.weights + int(0.15 * self.alone)
            self._budget(self.ceiling if draw() < 0.7 else self.random.randint(least, self.ceiling))

    def _budget(self, size: int) -> None:
        self.engine.channel.inbox.append(wire.Budget(size, self.ceiling, "the storm"))

    def _submit(self) -> None:
        rng = self.random
        length = min(CONTEXT - 60, int(16 * 2 ** (9.2 * rng.random() ** 1.5)))
        if self.engine.next_id % 16 == 3:
            length = CONTEXT - 60
        shared = rng.choice([0, 0, length // 2, 3 * length // 4])
        ids = [7 + i % 1000 for i in range(shared)] + rng.choices(range(1, 2000), k=length - shared)
        hot = rng.choice(SETTINGS)
        sampling = wire.Sampling(seed=rng.getrandbits(32), **hot)
        self.engine.submit(ids, sampling=sampling, max_tokens=rng.choice([3, 20, 50, 50, 90, 400, None]))
