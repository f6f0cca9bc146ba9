"""The engine's loop: receive, plan, run, emit; one step at a time, at most one in flight.

Owns the sequences and the step in flight; the only caller of the runner, hence the only code that makes MLX
compute once the model is loaded. Every byte of a step has its lease before it is launched (`accounts`). A
step is launched before the one before it is read (launching n+1 hides the host's work behind the device),
and nothing of a step leaves the engine before it has been read:

    launch n+1 ─ read n ─ emit n ─ receive ─ plan ─ launch n+2 ─ read n+1 …

Invariant: clients see ids that a clean read returned. After any error from MLX nothing since the last clean
read is believed: the rows of those steps are computed again from their ids, and the guilty fails alone.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from penstock import wire
from penstock.engine.accounts import Accounts
from penstock.engine.drawing import Drawing
from penstock.engine.grammar import COMPILE_BEAT, Grammars
from penstock.engine.prompt_cache import PromptCache
from penstock.engine.running import Running
from penstock.engine.sampler import Sampled
from penstock.engine.scheduler import (
    Admit,
    Chunk,
    ClearPool,
    Evict,
    Facts,
    GiveUp,
    Measure,
    Plan,
    Preempt,
    account,
    reads_first,
    schedule,
)
from penstock.engine.sequence import Sequence
from penstock.engine.status import Reporter
from penstock.engine.step import FAILURES, InFlight, answers, check, collect_errors, inputs, members
from penstock.guilt import MEMORY_WORDS, judge
from penstock.memory.ledger import Account
from penstock.memory.predict import MARGIN, Correction
from penstock.page import Page, Phase
from penstock.pipe import EngineChannel, FrontGone

log = logging.getLogger("penstock.engine")

BACKLOG_BOUND = 8 << 20
"""Bytes that may wait to be written to the front before the engine stops launching steps."""
IDLE_BEAT = 1.0
"""Seconds between signs of life while there is nothing to do."""


class ShutdownAsked(Exception):
    """The front asked the engine to stop."""


class Loop:
    """Runs sequences over a `Runner` until the front closes the channel."""

    def __init__(
        self,
        runner: Any,
        channel: EngineChannel,
        page: Page,
        facts: Facts,
        accounts: Accounts,
        cache: PromptCache,
        grammars: Grammars,
        drawing: Drawing,
        *,
        context_length: int,
        eos_ids: frozenset[int],
        pipelined: bool = True,
    ) -> None:
        self.runner, self.channel, self.page = runner, channel, page
        self.facts, self.accounts, self.cache = facts, accounts, cache
        self.active: Callable[[], int] = mx.get_active_memory
        self.leaving: list[Sequence] = []
        self.correction = Correction()
        self.counts: Counter[str] = Counter()
        self.reporter = Reporter(accounts, cache, self.counts)
        self.runnable = False
        self.context_length, self.eos_ids = context_length, eos_ids
        self.grammars, self.drawing = grammars, drawing
        self.pipelined = pipelined
        self.sequences: dict[int, Sequence] = {}
        self.in_flight: InFlight | None = None
        self.report = wire.Step([], [], [], [])
        self.running = Running(page)
        self.read_at, self.trial = 0.0, False

    def run(self) -> None:
        """Serve until the front closes the channel or says `Shutdown`."""
        try:
            while True:
                self.turn()
        except (ShutdownAsked, FrontGone):
            return

    def turn(self) -> None:
        """One turn: take what has arrived, run one step, report it."""
        self._receive()
        try:
            if (not self.pipelined or self._read_first()) and self.in_flight is not None:
                self._read()
                self._receive()  # what arrived while it ran need not wait for one more
            plan = self._plan()
            self.runnable = bool(plan) or self.in_flight is not None  # reading it may end a row
            launched = self._launch(plan) if plan else None
            if self.trial:
                self.facts = replace(self.facts, apart=not any(s.apart for s in members(launched)))
            self._read(launched)
            if launched is not None and launched.forward is not None:
                self._draw(launched)
        except FAILURES as error:
            self._recover(error)
        self._emit()
        if status := self.reporter.due(self.sequences.values(), self.facts):
            self.channel.send(status)

    def _read_first(self) -> bool:
        """Two chunks in flight would hold two chunks' activations; a suspect's step is to be alone."""
        self.trial = self.trial and any(s.apart for s in self.sequences.values())
        return self.trial or (self.in_flight is not None and self.in_flight.chunk is not None)

    # -- decisions ------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        """Ask, apply measures, ask again, until there is a plan (perhaps an empty one: all wait)."""
        self.cache.look(self.sequences.values(), time.monotonic())
        while True:
            orphans = self.runner.orphans + (self.in_flight.orphans if self.in_flight is not None else 0)
            self.accounts.keep_states(orphans)
            facts = replace(
                self.facts, departures=self.accounts.departures, correction=self.correction.factor
            )
            room = self.accounts.room(self.cache.evictable, self.cache.recent)
            decision = schedule(self.sequences.values(), facts, room)
            if isinstance(decision, Plan) and self._enter(decision):
                continue
            if self.in_flight is not None and reads_first(decision):
                self._read()
            elif isinstance(decision, Plan):
                if decision:
                    self.accounts.restore_pool(decision.transient)
                return decision
            else:
                self._apply(decision)

    def _enter(self, plan: Plan) -> bool:
        """Look into the cache for a sequence before its first step, as late as may be; then plan anew."""
        new = [sequence for sequence in plan.sequences if not sequence.entered]
        for sequence in new:
            self._begin(sequence)
        return bool(new)

    def _begin(self, sequence: Sequence) -> None:
        first_time = not sequence.why
        self.running.entering(sequence)
        self.cache.enter(sequence, self.sequences.values())
        if first_time:
            self.report.started.append(wire.Started(sequence.id, sequence.cached, sequence.why))

    def _apply(self, measure: Measure) -> None:
        if isinstance(measure, Admit | Evict) and self.cache.promises(measure):
            return  # another decision may follow from that
        self.counts[type(measure).__name__.lower()] += 1
        match measure:
            case Admit(sequence, capacity):
                measure.book()
                self.accounts.admit(sequence, capacity)
                sequence.row = self.runner.open(capacity)
                if sequence.grammar:
                    self.grammars.begin(sequence)
                if sequence.reuse:
                    self.counts["taken_over"] += 1
                    self._begin(sequence)
            case ClearPool():
                self.accounts.clear_pool()
            case Preempt(sequence):
                self.cache.preempt(sequence)
                self.grammars.drop(sequence)
                sequence.preempt(self.accounts.departures)
            case GiveUp(sequence):
                if len(sequence.tokens) > sequence.prompt_length:
                    self._end(sequence, "length")
                else:
                    message = "The memory that this request needs is not free on this machine; busy, retry."
                    self._end(sequence, "error", kind="OUT_OF_MEMORY", message=message)
            case Evict(size, sequence):
                self.cache.evict(size, keep=sequence)

    # -- messages -------------------------------------------------------------------------------------

    def _receive(self) -> None:
        nothing = self.in_flight is None and not self.runnable
        idle = nothing and not self.grammars.compiling
        if idle:
            self.page.begin(Phase.IDLE)
            self._guarded(self.cache.tidy)
            self._audit()
        for message in self.channel.receive(IDLE_BEAT if idle else COMPILE_BEAT if nothing else 0.0):
            self._guarded(self._take, message)
        while self.channel.backlog > BACKLOG_BOUND:
            for message in self.channel.receive(0.05):
                self._guarded(self._take, message)
            self.page.beat()
        for sequence, verdict in self.grammars.compiled():
            self._guarded(self._end, sequence, **verdict)
        self.page.beat()

    def _guarded(self, act: Callable[..., None], *about: Any, **verdict: str) -> None:
        """A row that ends is copied: that may fail, and may meet what a step in flight has failed with."""
        try:
            act(*about, **verdict)
        except FAILURES as error:
            self._recover(error)

    def _take(self, message: wire.ToEngine) -> None:
        match message:
            case wire.Submit():
                self._submit(message)
            case wire.End():
                if (sequence := self.sequences.get(message.id)) is not None:
                    try:
                        self.cache.stopped(sequence, message.keep)
                    finally:
                        self._end(sequence, "cut", computed=min(message.keep, sequence.computed))
            case wire.Budget():
                self.cache.set_budget(message.size)
            case wire.Release(cache):
                if cache:
                    self.cache.clear()
                self.accounts.clear_pool()
            case wire.Shutdown():
                raise ShutdownAsked
            case _:
                log.error("unexpected message %s", type(message).__name__)

    def _submit(self, message: wire.Submit) -> None:
        sequence = Sequence(message, self.context_length, self.grammars.host_bytes(message.grammar))
        self.trial = self.trial or sequence.apart
        self.sequences[sequence.id] = sequence
        reason = sequence.finish_reason(self.eos_ids)
        if reason is None and len(sequence.tokens) >= sequence.limit:
            reason = "length"
        if reason is not None:
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: str, *, computed: int | None = None, **error: str) -> None:
        del self.sequences[sequence.id]
        self.grammars.drop(sequence)
        kept = sequence.computed if computed is None else computed
        self.report.ended.append(wire.Ended(sequence.id, reason, kept, **error))
        if sequence.row is None:
            return
        self.accounts.departures += 1
        if sequence.launched > sequence.computed:
            self.leaving.append(sequence)  # a step with it is in flight, and may still be read cleanly
        else:
            self.cache.leave(sequence)

    def _let_go(self, left: list[Sequence]) -> None:
        """Publish the rows of sequences that ended while the step that was read now was in flight."""
        for sequence in left:
            self.leaving.remove(sequence)
            sequence.computed = min(sequence.launched, len(sequence.tokens))
            self.cache.leave(sequence)

    def _emit(self) -> None:
        report = self.report
        if report.rows or report.started or report.prefill or report.ended:
            self.channel.send(report)
            self.report = wire.Step([], [], [], [])

    # -- one step -------------------------------------------------------------------------------------

    def _launch(self, plan: Plan) -> InFlight:
        for sequence, capacity in plan.grow:
            self.accounts.grow(sequence, capacity)
        lease = self.accounts.begin(plan.transient)
        step = InFlight(plan.decode, plan.chunk, lease, time.monotonic())
        self.running.only(members(self.in_flight))
        orphans = self.runner.orphans
        try:
            for sequence, capacity in plan.grow:
                self.runner.reserve(sequence.row, capacity)
            if plan.decode:
                self._launch_decode(step)
            if plan.chunk is not None:
                self._hear(step)
                step.chunk_arrays = self._launch_chunk(plan.chunk)
        except BaseException:
            self.accounts.ledger.release(lease)
            raise
        step.orphans = max(0, orphans - self.runner.orphans)
        step.lasting = self.accounts.lasting
        return step

    def _launch_decode(self, step: InFlight) -> None:
        """The forward pass, and the draws too, unless a grammar has to know the ids in flight first."""
        self.running.decode(rows := step.rows)
        self.cache.passing(rows)
        ids = inputs(rows, self.in_flight)
        step.forward = self.runner.decode([s.row for s in rows], ids), ids
        self.facts = replace(self.facts, stacked=tuple(s.id for s in rows))
        for sequence in rows:
            sequence.launched += 1
        if any(s.grammar for s in rows):
            mx.async_eval(step.forward[0])  # type: ignore[no-untyped-call]
        else:
            self._draw(step)

    def _draw(self, step: InFlight) -> None:
        """Launch a step's draws. Masks are made here, on the host, while its forward pass runs."""
        assert step.forward is not None
        masks, verdicts = self.grammars.masks(step.rows)
        for sequence, verdict in verdicts:
            self._end(sequence, **verdict)
        step.draws = self.drawing.draw(step.rows, *step.forward, masks)
        step.forward = None

    def _hear(self, step: InFlight) -> None:
        """Read and tell the ids of a step before its chunk, whose launch takes as long as the chunk does."""
        if step.forward is not None:
            self._draw(step)
        if step.draws is not None:
            self._read_draws(step, step.draws)
            self._was_read(step)
            step.draws = None
        self._emit()

    def _launch_chunk(self, chunk: Chunk) -> Any:
        sequence = chunk.sequence
        self.running.prefill(sequence, chunk.length, self.facts.seconds_per_prefill_id or 0.0)
        self.reporter.chunk(chunk)
        start = sequence.launched
        ids = sequence.tokens[start : start + chunk.length]
        arrays = self.runner.prefill(sequence.row, ids)
        mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        account(chunk, [s for s in self.sequences.values() if s.prefill_left])
        sequence.launched += chunk.length
        return arrays

    def _read(self, following: InFlight | None = None) -> None:
        """Wait for the step in flight and book what it brought. Raises what MLX raises, also late."""
        step, self.in_flight = self.in_flight, following
        left = list(self.leaving)
        if step is None:
            return
        try:
            if following is None:
                mx.synchronize()  # its buffers are free as well: the next step writes to rows in place
            if step.draws is not None:
                self._read_draws(step, step.draws)
            if step.chunk is not None:
                self._read_chunk(step)
            self._observe(step)
        finally:
            self.accounts.ledger.release(step.lease)
        self._was_read(step)
        self._let_go(left)

    def _was_read(self, step: InFlight) -> None:
        self.running.read(step.seconds(self.read_at), step.draws is not None)
        self.read_at = time.monotonic()
        self.page.step_done()

    def _observe(self, step: InFlight) -> None:
        """Compare the peak since the last read with what is granted. Rows not yet written make it smaller."""
        peak = int(mx.get_peak_memory())
        mx.reset_peak_memory()
        granted = self.accounts.ledger.balance(Account.TRANSIENT)
        measured = peak - max(step.lasting, self.accounts.lasting)
        self.correction.observe(granted, int(measured * MARGIN))
        self.reporter.observed(granted, measured, self.correction.factor)
        if mx.get_cache_memory() > self.accounts.ledger.balance(Account.POOL):
            mx.clear_cache()  # a freed buffer may be larger than all that the pool is to hold

    def _read_draws(self, step: InFlight, draws: Sampled) -> None:
        for sequence, row in answers(step.rows, draws):
            if self.sequences.get(sequence.id) is not sequence:
                continue  # it ended before this step: a spare draw
            sequence.tokens.append(row.tokens[0])
            sequence.computed = len(sequence.tokens) - 1
            self.report.rows.append(row)
            if verdict := self.grammars.advance(sequence, row.tokens[0]):
                self._end(sequence, **verdict)
            elif reason := sequence.finish_reason(self.eos_ids):
                self._end(sequence, reason)

    def _read_chunk(self, step: InFlight) -> None:
        chunk = step.chunk
        assert chunk is not None
        step.wait_for_chunk()
        check()
        sequence = chunk.sequence
        speed = step.seconds_per_prefill_id(self.read_at, self.facts.seconds_per_prefill_id)
        self.facts = replace(self.facts, seconds_per_prefill_id=speed)
        if self.sequences.get(sequence.id) is sequence:
            sequence.computed += chunk.length
            self.cache.reached(sequence)
            self.report.prefill.append(wire.Prefill(sequence.id, sequence.computed, sequence.prompt_length))

    # -- errors ---------------------------------------------------------------------------------------

    def _recover(self, error: Exception) -> None:
        """Rows of the steps that failed start again from the last clean read; who is guilty fails alone."""
        log.error("a step failed, its rows are computed again: %s", str(error))  # not its frames
        log.debug("where it failed", exc_info=True)
        memory = isinstance(error, MemoryError) or bool(MEMORY_WORDS.search(str(error)))
        self.counts["errors"] += 1
        self.counts["out_of_memory"] += memory
        accused = self.running.accused(self.sequences)
        guilty = judge(accused)
        if self.in_flight is not None:
            self.accounts.ledger.release(self.in_flight.lease)
        self.in_flight, self.trial = None, True
        self.drawing.forget()
        collect_errors()
        for sequence in [*self.leaving, *(s for s, _ in accused)]:
            self.cache.rescue(sequence)
            self.grammars.drop(sequence)
            sequence.restart()
        self.leaving = []
        for sequence in guilty:
            kind = "OUT_OF_MEMORY" if memory else "INTERNAL"
            message = f"The engine failed twice at this request alone: {str(error)[:200]}"
            self._end(sequence, "error", kind=kind, message=message)
        self.running.only(())
        self.facts = replace(self.facts, stacked=())

    def _audit(self) -> None:
        """With nothing in flight: does everyone hold what the books say?"""
        self.accounts.keep_states(self.runner.orphans)
        on_board = [s for s in self.sequences.values() if s.row is not None]
        rows = {s.id: self.runner.row_bytes(s.row) for s in on_board}
        for finding in self.accounts.audit(rows, self.cache.leases(), self.active()):
            log.warning("audit: %s", finding)
            self.counts["audit_repairs"] += 1
