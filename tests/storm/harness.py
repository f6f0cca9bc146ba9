"""Storms: random traffic over a real model in a tight budget, each step's memory measured and compared.

Two ways to run one. Pipelined, as in service: peaks between two reads hold parts of two steps, so only the
bound can be checked. Not pipelined: a peak belongs to one step, so it is compared with what was predicted for
that step, by kind. The allocator's own counters are read around the loop's `_launch` and `_observe`.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from tests.storm.record import Record
from tests.storm.subjects import Subject, small
from tests.support.engine_loop import EngineLoop

from penstock import wire
from penstock.engine import calibrate, limits, scheduler, sequence
from penstock.memory.audit import TOLERANCE
from penstock.memory.costs import Fit
from penstock.memory.ledger import Account
from penstock.memory.predict import Transient

ROWS, PROMPTS, OPEN = 12, 8, 24
"""Rows at once, prompts at once, requests that are open all the time."""

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 30, "logprobs": 5},
    {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1, "repetition_penalty": 1.1},
]


@dataclass
class Launch:
    """What was planned, and what the engine held then and was to hold when its rows have grown."""

    kind: str
    predicted: int
    budget: int
    alone: bool
    active: int
    lasting: int
    """Under lease beside the pool and transients."""
    words: str
    copied: bool = False
    """Into the prompt cache, while it ran."""


def measured(subject: Subject, longest: int, pipelined: bool) -> Transient:
    """The predictor, as the server gets it at its start."""
    return calibrate.calibrate(
        subject.runner,
        subject.vocab,
        room=subject.room,
        context_length=subject.context,
        longest=longest,
        pipelined=pipelined,
        per_score=subject.per_score,
    )


class Storm:
    """One model, one budget, one seed."""

    def __init__(
        self,
        subject: Subject | str,
        *,
        seed: int = 0,
        share: float = 1.5,
        pipelined: bool = True,
        cache: bool = False,
        transient: Transient | None = None,
        longest: int = 1024,
    ) -> None:
        """`share`: the budget as a multiple of what the longest sequence needs alone."""
        subject = small(subject) if isinstance(subject, str) else subject
        self.random = random.Random(seed)
        self.runner, self.context = subject.runner, subject.context
        self.transient = transient or measured(subject, longest, pipelined)
        costs = calibrate.costs_of(self.runner)
        mx.synchronize()
        mx.clear_cache()
        self.weights = mx.get_active_memory()
        self.alone = Fit(costs, self.transient).alone(self.context)
        self.foreign = self.weights - subject.weights
        self.ceiling = self.weights + int(share * self.alone)
        self.cache_limit, self.memory_limit = mx.set_cache_limit(0), mx.set_memory_limit(self.ceiling)
        self.engine = EngineLoop(
            self.runner,
            vocab_size=subject.vocab,
            context_length=self.context,
            pipelined=pipelined,
            weights=self.weights,
            ceiling=self.ceiling,
            cache_bytes=None if cache else 0,
            transient=self.transient,
            chunk_longest=longest,
            decode_concurrency=ROWS,
            prompt_concurrency=PROMPTS,
            stall_target=1e9,
        )
        accounts = self.engine.accounts
        accounts.set_pool, accounts.set_throttle = limits.set_pool, mx.set_memory_limit  # as in service
        self.record = Record()
        self.bound = 1.0
        self.pool = self.peak = self.leased = 0
        self.launches: list[Launch] = []
        self._watch()

    # -- measuring -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        loop, accounts = self.engine.loop, self.engine.accounts
        launch, observe, recover, set_pool = loop._launch, loop._observe, loop._recover, accounts.set_pool
        self.pool = accounts.ledger.balance(Account.POOL)

        def watched_pool(limit: int) -> None:
            self.pool = max(self.pool, limit)
            set_pool(limit)

        def watched_launch(plan: Any) -> Any:
            if not self.launches:
                self._new_peak()
                self.pool = accounts.ledger.balance(Account.POOL)
            self.launches.append(self._planned(plan))
            self.leased = accounts.lasting
            return launch(plan)

        def watched_observe(step: Any) -> None:
            self._compare(self._new_peak())
            observe(step)
            beyond = int(mx.get_cache_memory()) - self.pool
            self.record.pool_beyond = max(self.record.pool_beyond, beyond)
            self.record.expect(beyond <= 0, f"the pool keeps {beyond} bytes more than {self.pool}")
            self.pool = accounts.ledger.balance(Account.POOL)

        def watched_recover(error: Exception) -> None:
            self.launches.clear()
            recover(error)

        loop._launch, loop._observe, loop._recover = watched_launch, watched_observe, watched_recover  # type: ignore[method-assign]
        accounts.set_pool = watched_pool
        if not loop.pipelined:
            self._watch_cache()

    def _watch_cache(self) -> None:
        """What the prompt cache holds while it copies, beside what it has asked room for."""
        cache, accounts = self.engine.cache, self.engine.accounts
        room = cache._room

        def watched_room(size: int) -> bool:
            granted = room(size)
            self.leased = max(self.leased, accounts.lasting + size * granted)
            return granted

        def watched(kind: str, act: Any) -> Any:
            def run(*args: Any, **named: Any) -> None:
                step = self.launches[0] if self.launches else None
                if step is not None and "prefill" in step.kind:
                    before = accounts.lasting
                    act(*args, **named)
                    step.copied |= accounts.lasting != before  # the peak is the chunk's and the copy's
                    return
                peak, leased = self._new_peak(), self.leased
                active, before = int(mx.get_active_memory()), accounts.lasting
                self.leased = before
                size = accounts.rows[args[0].id].size
                row = size if kind == "assemble" else 0  # leased, but not yet there
                act(*args, **named)
                words = f"{len(args[0].tokens)} ids, {args[0].cached} cached, {size} bytes of row"
                self.record.copied(kind, self._new_peak() - active, self.leased - before + row, words)
                self.peak, self.leased = peak, max(leased, self.leased)

            return run

        cache._room = watched_room  # type: ignore[method-assign]
        cache.enter = watched("assemble", cache.enter)  # type: ignore[method-assign]
        for name in ("leave", "preempt", "reached"):
            setattr(cache, name, watched("publish", getattr(cache, name)))

    def _new_peak(self) -> int:
        """The peak since it was asked for last; where the cache has copied meanwhile, without that."""
        peak, self.peak = max(self.peak, int(mx.get_peak_memory())), 0
        mx.reset_peak_memory()
        return peak

    def _planned(self, plan: Any) -> Launch:
        loop, ledger = self.engine.loop, self.engine.accounts.ledger
        on_board = [s for s in loop.sequences.values() if s.row is not None]
        parts = ["growth"] if plan.grow else []
        if plan.chunk is not None:
            parts.append(f"prefill {10 * plan.chunk.sequence.launched // (self.context + 1)}")
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
            in_use = (ledger.held + plan.transient) / ledger.budget
            self.record.in_use.append(in_use)
            self.record.unused[self._why_unused(plan)] += max(0.0, 1 - in_use)
        costs = loop.facts.costs
        growth = sum(costs.growth(s.capacity, capacity) for s, capacity in plan.grow)
        # A chunk's first keys allocate its row, perhaps before one that ends meanwhile goes.
        begins = plan.chunk is not None and plan.chunk.sequence.row.length == 0
        first = costs.growth(0, plan.chunk.sequence.row.capacity) if begins else 0
        return Launch(
            " + ".join(parts),
            plan.transient,
            ledger.budget,
            len(on_board) == 1,
            int(mx.get_active_memory()) + growth + first,
            self.engine.accounts.lasting + growth,
            f"{len(plan.decode)} rows of {sum(s.launched + 1 for s in plan.decode)} ids, growing "
            f"{[(s.capacity, capacity) for s, capacity in plan.grow]}, chunk of "
            f"{plan.chunk and (plan.chunk.length, plan.chunk.sequence.launched)}",
        )

    def _why_unused(self, plan: Any) -> str:
        """What keeps everybody who waits from the bytes that this plan leaves."""
        loop = self.engine.loop
        facts, ledger = replace(loop.facts, departures=loop.accounts.departures), loop.accounts.ledger
        ordered = sorted(loop.sequences.values(), key=lambda s: s.arrival)
        waiting = [s for s in ordered if s.row is None]
        on_board = [s for s in ordered if s.row is not None]
        free = ledger.room - plan.transient
        needs = {s.id: scheduler.entry_bytes(s, s.first_capacity, facts) for s in waiting}
        head = waiting[0]
        if sum(s.prefill_left > 0 for s in on_board) >= facts.prompt_concurrency:
            return "prompts at once"
        if not any(need <= free for need in needs.values()):
            return "nobody fits"
        if head.preempted_at is not None:
            if not head.may_return(facts.departures):
                return "first was preempted, departures"
            return "first was preempted, " + ("its growth" if needs[head.id] <= free else "its size")
        return "passing is used up"

    def _compare(self, peak: int) -> None:
        """Peak and pool since the last read, against the budgets of the steps that ran since then."""
        # A row may have been let in under a raised budget since: its memory is in the peak already.
        now = self.engine.accounts.ledger.budget
        bound = max(now, *(self.ceiling if launch.alone else launch.budget for launch in self.launches))
        share = (peak + self.pool) / bound
        words = f"{peak} and a pool of {self.pool} in {bound}: {self.launches}"
        self.record.expect(share <= self.bound, words)
        self.record.tightest = max(self.record.tightest, share)
        self.record.steps += 1
        step = self.launches.pop(0)
        if not self.engine.loop.pipelined:
            active = int(mx.get_active_memory())
            lasting = self.engine.accounts.lasting
            unknown = active - lasting
            self.record.expect(unknown <= TOLERANCE, f"{unknown} bytes last that are not leased: {step}")
            leased = max(step.lasting, lasting, self.leased) + step.predicted + TOLERANCE
            words = f"the step held {peak}, more than was leased, {leased}: {step}"
            self.record.expect(peak <= leased * self.bound, words)
            if step.copied:
                return
            measured = max(0, peak - max(step.active, active))
            ratio = measured / max(1, step.predicted)
            if ratio > self.record.worst():
                self.record.worst_step = f"{step.kind}, {measured} of {step.predicted} bytes: {step.words}"
            self.record.ratios[step.kind].append((ratio, measured))

    # -- traffic -------------------------------------------------------------------------------------

    def run(self, steps: int, *, traffic: bool = True, seconds: float = math.inf) -> Record:
        """Traffic until that many steps were computed, or so long, then everything is ended.

        Without `traffic` only what was submitted before, to its end or to that many steps.
        """
        first_room, sequence.FIRST_ROOM = sequence.FIRST_ROOM, 32  # rows grow early, and often
        began = time.monotonic()
        try:
            while self.record.steps < steps and (traffic or self._open()):
                if time.monotonic() - began > seconds:
                    break
                if traffic:
                    self._disturb()
                self.engine.turn()
            self._budget(self.ceiling)
            for id_ in list(self.engine.loop.sequences):
                self.engine.end(id_)
            for _ in range(4):
                self.engine.turn()
            self.record.counts.update(self.engine.loop.counts)
            self.record.seconds = time.monotonic() - began
            self.engine.close()
            assert not self.record.broken, "\n".join(self.record.broken[:5])
            return self.record
        finally:
            sequence.FIRST_ROOM = first_room
            self.restore()

    def restore(self) -> None:
        """MLX's limits as they were before."""
        mx.set_cache_limit(self.cache_limit)
        mx.set_memory_limit(self.memory_limit)

    def _open(self) -> bool:
        return bool(self.engine.channel.inbox or self.engine.loop.sequences)

    def _disturb(self) -> None:
        draw = self.random.random
        alive = list(self.engine.loop.sequences.values())
        if len(alive) < OPEN:
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
        doublings = math.log2(1.15 * self.context / 16)
        length = min(self.context - 60, int(16 * 2 ** (doublings * rng.random() ** 1.5)))
        if self.engine.next_id % 16 == 3:
            length = self.context - 60
        shared = rng.choice([0, 0, length // 2, 3 * length // 4])
        ids = [7 + i % 1000 for i in range(shared)] + rng.choices(range(1, 2000), k=length - shared)
        hot = rng.choice(SETTINGS)
        sampling = wire.Sampling(seed=rng.getrandbits(32), **hot)
        self.engine.submit(ids, sampling=sampling, max_tokens=rng.choice([3, 20, 50, 50, 90, 400, None]))
