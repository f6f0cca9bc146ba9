"""The engine's loop in this process: a channel made of lists, and a way to play submissions to their ends."""

from __future__ import annotations

import gc
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from tests.support.laws import conserves, live_buffers

from penstock import wire
from penstock.engine.accounts import Accounts
from penstock.engine.calibrate import costs_of
from penstock.engine.drawing import Drawing
from penstock.engine.grammar import Grammars
from penstock.engine.loop import Loop
from penstock.engine.prompt_cache import PromptCache
from penstock.engine.scheduler import Facts
from penstock.memory.ledger import Account
from penstock.memory.predict import Scalars, Transient
from penstock.page import Page
from penstock.pipe import FrontGone

FREE = Transient(Scalars(0, 0, 0), Scalars(0, 0, 0))
"""A predictor for tests that are not about memory."""


class ListChannel:
    """What `pipe.EngineChannel` is to the loop. `inbox` is taken a message list at a time; None closes."""

    def __init__(self) -> None:
        self.inbox: list[wire.ToEngine | None] = []
        self.sent: list[wire.ToFront] = []
        self.backlog = 0

    def receive(self, timeout: float | None = 0.0) -> list[wire.ToEngine]:
        taken, self.inbox = self.inbox, []
        if None in taken:
            raise FrontGone
        return [message for message in taken if message is not None]

    def send(self, message: wire.ToFront) -> None:
        self.sent.append(message)


@dataclass
class Answer:
    """What came back for one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    prefilled: list[int] = field(default_factory=list)
    cached: int = 0
    why: str = ""
    ended: wire.Ended | None = None


class EngineLoop:
    """A loop over a runner, fed by hand, one turn at a time."""

    def __init__(
        self,
        runner: Any,
        *,
        vocab_size: int,
        eos_ids: Sequence[int] = (),
        context_length: int = 4096,
        pipelined: bool = True,
        ceiling: int = 4 << 30,
        weights: int = 0,
        cache_bytes: int | None = 0,
        folder: Path = Path(),
        transient: Transient = FREE,
        **facts: Any,
    ) -> None:
        self.channel = ListChannel()
        self.page = Page.create()
        costs = costs_of(runner)
        self.accounts = Accounts(ceiling, weights, costs, mx.set_cache_limit)
        self.cache = PromptCache(runner, self.accounts, max_bytes=cache_bytes)
        defaults: dict[str, Any] = {
            "costs": costs,
            "transient": transient,
            "decode_concurrency": 32,
            "prompt_concurrency": 8,
            "chunk_longest": 64,
            "stall_target": 0.2,
        }
        self.loop = Loop(
            runner,
            self.channel,  # type: ignore[arg-type]
            self.page,
            Facts(**{**defaults, **facts}),
            self.accounts,
            self.cache,
            Grammars(self.accounts, folder, vocab_size, eos_ids),
            Drawing(vocab_size, eos_ids, ()),
            context_length=context_length,
            eos_ids=frozenset(eos_ids),
            pipelined=pipelined,
        )
        # Other tests' models are alive beside this one's; those that are garbage must not go in mid-test.
        gc.collect()
        others = mx.get_active_memory() - weights
        self.loop.active = lambda: int(mx.get_active_memory()) - others
        self.answers: dict[int, Answer] = {}
        self.next_id = 1

    def submit(self, prompt: Sequence[int], *, sampling: wire.Sampling | None = None, **fields: Any) -> int:
        """A new sequence; returns its id."""
        id_ = self.next_id
        self.next_id += 1
        delivered = array("I", fields.pop("delivered", ())).tobytes()
        self.channel.inbox.append(
            wire.Submit(
                id=id_,
                prompt=array("I", prompt).tobytes(),
                sampling=sampling or wire.Sampling(),
                arrival=fields.pop("arrival", id_),
                delivered=delivered,
                **fields,
            )
        )
        self.answers[id_] = Answer()
        return id_

    def end(self, id_: int, keep: int = 0) -> None:
        """The front's `End`."""
        self.channel.inbox.append(wire.End(id_, keep))

    def turn(self) -> None:
        """One turn of the loop, and its report taken in."""
        self.loop.turn()
        self._collect()

    def play(self, turns: int = 5000) -> None:
        """Turns until every sequence has ended."""
        for _ in range(turns):
            self.turn()
            if all(a.ended for a in self.answers.values()) and self.loop.in_flight is None:
                return
        raise AssertionError(f"not ended after {turns} turns: {self.answers}")

    def close(self) -> None:
        """Let go of the page; nothing may be left in the runner."""
        assert not self.loop.sequences
        assert not self.loop.leaving
        self.loop._audit()
        assert self.loop.counts["audit_repairs"] == 0
        self.cache.clear()
        assert self.accounts.ledger.balance(Account.CACHED) == 0, "the cache holds what can't be evicted"
        assert not live_buffers(self.loop.runner), "the engine is not empty when idle"
        assert not self.accounts.rows
        assert self.accounts.ledger.balance(Account.LIVE_KV) == 0
        assert self.accounts.ledger.balance(Account.TRANSIENT) == 0
        assert conserves(self.accounts.ledger)
        self.page.close()

    def _collect(self) -> None:
        for message in self.channel.sent:
            if isinstance(message, wire.Status):
                assert sum(message.accounts.values()) <= message.budget or message.running <= 1
                continue
            assert isinstance(message, wire.Step)
            for row in message.rows:
                answer = self.answers[row.id]
                assert answer.ended is None, "an id after the end"
                answer.tokens += row.tokens
                answer.logprobs += row.logprobs or []
                answer.top += row.top or []
            for started in message.started:
                self.answers[started.id].cached = started.cached
                self.answers[started.id].why = started.why
            for prefill in message.prefill:
                self.answers[prefill.id].prefilled.append(prefill.done)
            for ended in message.ended:
                assert self.answers[ended.id].ended is None, "ended twice"
                self.answers[ended.id].ended = ended
        self.channel.sent.clear()
