"""The backend: the API's one door to the engine, whichever engine process is behind it at the moment.

Owns the machine, the journal and the current engine; acts out what the machine decides. All of it runs on one
event loop. A ticket outlives its engine: when that dies the open sequences are submitted to the next one with
what was delivered, and the same tickets go on. Messages of a dead engine are void, because its channel is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from time import monotonic, time
from typing import Any

import msgspec

from penstock import wire
from penstock.errors import Kind, PenstockError
from penstock.guilt import must_be_sole
from penstock.memory.probe import system_probe
from penstock.supervisor import machine as m
from penstock.supervisor.autopsy import DeathLog, memory_sign
from penstock.supervisor.idle import Idle, Part
from penstock.supervisor.incarnation import Engine as _Engine
from penstock.supervisor.journal import Entry, Journal, accused, convicted, in_order_of_resubmission
from penstock.supervisor.observer import Observer
from penstock.supervisor.process import COMMAND, describe_exit
from penstock.supervisor.queue import QueueLimits
from penstock.supervisor.reports import take
from penstock.supervisor.ticket import Done, Finished, Job, Progress, Ticket, TicketStats, Tokens
from penstock.supervisor.warden import Warden

__all__ = ["Backend", "Done", "Finished", "Job", "Progress", "Ticket", "TicketStats", "Tokens"]

_log = logging.getLogger("penstock.supervisor")
_SEED_BITS = 53


class Backend:
    """Jobs in, tickets out; `state` and `reason` say how the engine is."""

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        *,
        policy: m.Policy | None = None,
        limits: m.HangLimits | None = None,
        environment: Mapping[str, str] | None = None,
        warden: Warden | None = None,
        queue: QueueLimits | None = None,
        idle: Idle | None = None,
    ) -> None:
        self.command = command
        self.warden = warden or Warden(system_probe())
        self.status: wire.Status | None = None
        self._queue = queue or QueueLimits()
        self.environment = environment
        self.ready: wire.Ready | None = None
        self.stage = ""
        self.given_back: dict[str, int] = {}
        """When each part was last given back for want of requests, in seconds of Unix time."""
        self._idle = idle or Idle()
        self._limits = limits or m.HangLimits()
        self._life = m.EngineLife(policy)
        self.journal = Journal()
        self.observer = Observer(self)
        self._engine: _Engine | None = None
        self._epoch = 0
        self._options: wire.EngineOptions | None = None
        self._unsent: deque[Entry] = deque()
        self._sole: Entry | None = None
        self._deaths = DeathLog()
        self._draining = False
        self._changed = asyncio.Event()
        self._stopped = False
        self._watch_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> str:
        """downloading (not started yet), loading, ready, stalled, restarting, unloaded, halted, stopping."""
        if self._draining:
            return m.State.STOPPING.value
        if self._stalled is not None:
            return "stalled"
        return self._life.state.value if self._options is not None else "downloading"

    @property
    def reason(self) -> str | None:
        """Why it is restarting, stalled or halted."""
        if self._stalled is not None:
            return f"the engine has made no progress for {self._stalled:.0f} s"
        return self._life.reason

    @property
    def _stalled(self) -> float | None:
        """Seconds."""
        if self._engine is None or self._life.state is not m.State.READY:
            return None
        return self._engine.watch.stalled

    def start(self, options: wire.EngineOptions) -> None:
        """Starts the first engine and returns at once; void after `stop`. Once, on the event loop."""
        if self._draining:
            return
        self._options = options
        self._act(self._life.start())
        self._watch_timer = asyncio.get_running_loop().call_later(self._limits.interval, self._look)

    async def wait_ready(self) -> wire.Ready:
        """The engine's facts, as soon as an engine has once been ready; a later restart does not change them.

        Raises PenstockError (ENGINE_HALTED, SHUTTING_DOWN).
        """
        while True:
            self._refuse()
            if self.ready is not None:
                return self.ready
            await self._changed.wait()

    def open(self, job: Job) -> Ticket:
        """Takes a job; it waits while no engine is ready. Raises PenstockError as `wait_ready` does."""
        self._refuse()
        speed = self.status.seconds_per_prefill_id if self.status is not None else None
        self._queue.check(*self.journal.waiting(), len(job.prompt), speed)
        seed = job.seed if job.seed is not None else job.sampling.seed or secrets.randbits(_SEED_BITS)
        ticket = Ticket(job, self.journal.new_ids(job.n), self._end)
        for choice, id in enumerate(ticket.ids):
            sampling = msgspec.structs.replace(job.sampling, seed=seed, choice=choice)
            entry = Entry(id, choice, job, sampling, ticket)
            self.journal.add(entry)
            self._unsent.append(entry)
        self._idle.look(monotonic(), busy=True)
        if self._life.state is m.State.UNLOADED:
            _log.info("a request has come: the engine is being started")
            self._act(self._life.wanted())
        self._flush()
        return ticket

    async def stop(self, drain_seconds: float) -> None:
        """Admits nothing more, gives open jobs `drain_seconds` to end, fails the rest, ends the engine."""
        self._draining = True
        self._notify()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while any(entry.life.is_open for entry in self.journal) and not self._stopped:
                    await self._changed.wait()
        self._fail_open(Kind.SHUTTING_DOWN, "The server is shutting down.")
        if self._life.state is not m.State.STOPPING:
            self._act(self._life.stop(monotonic()))
        while not self._stopped:
            await self._changed.wait()
        if self._watch_timer is not None:
            self._watch_timer.cancel()

    @property
    def deaths(self) -> int:
        """Engines that died, in all."""
        return self._life.deaths

    def clear_cache(self) -> bool:
        """Drops the cached prefixes; rows go on. False: no engine is ready, so nothing is cached."""
        if self._engine is None or self._life.state is not m.State.READY:
            return False
        self._engine.channel.send(wire.Release(cache=True))
        return True

    def snapshot(self) -> dict[str, Any]:
        """How things are, for /health: plain values, taken without asking the engine."""
        memory = None
        if self.status is not None:
            memory = {**msgspec.structs.asdict(self.status), "ceiling": self.warden.ceiling}
            del memory["cache"], memory["rows"], memory["preempted"]
        return {
            "state": self.state,
            "reason": self.reason,
            "stage": self.stage,
            "engine_deaths": self.deaths,
            **self.journal.facts(),
            "memory": memory,
            "given_back": dict(self.given_back),
            "engine": None if self._engine is None else self._engine.facts(),
        }

    # Acting out the machine's decisions.

    def _act(self, actions: list[m.Action]) -> None:
        for action in actions:
            match action:
                case m.Spawn():
                    self._spawn()
                case m.Kill(stacks):
                    if self._engine is not None:
                        self._engine.process.kill(stacks, self._limits.kill_grace)
                case m.WaitUntil(at):
                    asyncio.get_running_loop().call_later(max(0.0, at - monotonic()) + 0.001, self._tick)
                case m.SubmitOpen():
                    waiting = [e for e in self.journal if e.life.is_open and e.epoch is None]
                    self._unsent = deque(in_order_of_resubmission(waiting))
                    self._sole = next((e for e in reversed(waiting) if must_be_sole(e, e.computed)), None)
                    self._flush()
                case m.FailOpen(kind, message):
                    self._fail_open(kind, message)
                case m.AskExit():
                    if self._engine is not None:
                        self._engine.channel.send(wire.Shutdown())
                case m.Stopped():
                    self._stopped = True
        self._notify()

    def _spawn(self) -> None:
        assert self._options is not None
        self._epoch += 1
        self.stage = ""
        try:
            engine = self._engine = _Engine(self, self._epoch, self._limits)
        except (OSError, RuntimeError) as error:
            _log.error("the engine could not be started: %s", error)
            self._act(self._life.died(monotonic(), f"it could not be started: {error}"))
            return
        engine.channel.send(wire.Start(self._options))
        task = asyncio.get_running_loop().create_task(engine.channel.connect(engine.process.socket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tick(self) -> None:
        self._act(self._life.tick(monotonic(), self._has_room()))

    def _has_room(self) -> bool:
        return self.warden.has_room(0 if self.ready is None else self.ready.weights_bytes)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _refuse(self) -> None:
        if self._draining or self._life.state is m.State.STOPPING:
            raise PenstockError(Kind.SHUTTING_DOWN, "The server is shutting down.")
        if self._life.state is m.State.HALTED:
            raise PenstockError(Kind.ENGINE_HALTED, f"The model cannot be served: {self._life.reason}")

    # From the API.

    def _end(self, id: int, keep: int | None) -> None:
        """`keep` None: everything computed so far counts."""
        entry = self.journal.get(id)
        if entry is None:
            return
        reason = "abort" if keep is None else "stop"
        keep = entry.length if keep is None else keep
        engine_knows = entry.epoch is not None
        if not entry.life.end(engine_knows):
            return
        if engine_knows and self._engine is not None:
            self._engine.channel.send(wire.End(id, keep))
        elif not engine_knows:
            self.journal.drop(entry)
        generated = max(0, min(keep, entry.length) - len(entry.job.prompt))
        self.observer.ended(entry, reason)
        entry.ticket.put_finished(entry.choice, "cut", generated)
        self._notify()

    def _flush(self) -> None:
        engine = self._engine
        if engine is None or self._life.state is not m.State.READY:
            return
        sole = self._alone_on_board()
        waiting = self._unsent if sole is None else deque([sole] if sole.epoch is None else [])
        while waiting and engine.channel.writable:
            entry = waiting.popleft()
            if entry.life.is_open and entry.epoch is None:
                entry.epoch = engine.epoch
                engine.channel.send(entry.submit())

    def _alone_on_board(self) -> Entry | None:
        """Who has to pass alone at present; everybody else waits for it."""
        entry = self._sole
        if entry is not None and not (entry.life.is_open and must_be_sole(entry, entry.computed)):
            self._sole = None
        return self._sole

    def _finish(self, entry: Entry, reason: str) -> None:
        self.journal.drop(entry)
        if entry.life.ended():
            self.observer.ended(entry, reason)
            entry.ticket.put_finished(entry.choice, reason, len(entry.delivered))
            self._notify()

    def _fail(self, entry: Entry, error: PenstockError) -> None:
        self.journal.drop(entry)
        if entry.life.ended():
            self.observer.ended(entry, "error")
            entry.ticket.put_failure(entry.choice, error)
            self._notify()

    def _fail_open(self, kind: Kind, message: str) -> None:
        for entry in self.journal:
            self._fail(entry, PenstockError(kind, message))

    # From the engine.

    def _message(self, engine: _Engine, message: wire.ToFront) -> None:
        if engine is not self._engine:
            return
        match message:
            case wire.Step():
                self._step(message)
            case wire.Device():
                engine.channel.send(self.warden.device(message, monotonic()))
            case wire.Status():
                self.status = message
                self.observer.heard(message)
            case wire.Loading(stage):
                self.stage = stage
            case wire.Ready():
                self.ready = message
                self._finish_delivered()
                self._act(self._life.ready())
            case wire.Halt(reason):
                _log.error("the engine halts: %s", reason)
                engine.verdict = reason
                self._act(self._life.halt(reason))

    def _step(self, step: wire.Step) -> None:
        progress = take(step, self.journal, self.observer)
        for ended in step.ended:
            entry = self.journal.get(ended.id)
            if entry is None:
                continue
            if ended.reason == "error":
                kind = Kind.__members__.get(ended.kind or "", Kind.INTERNAL)
                self._fail(entry, PenstockError(kind, ended.message or "The engine failed."))
            else:
                self._finish(entry, ended.reason)
        if progress:
            self._life.progressed()
        if self._sole is not None:
            self._flush()

    def _drop_overdue(self) -> None:
        longest = self._queue.seconds
        if longest is None:
            return
        busy = f"The server is busy, retry: {longest:g} s passed."
        for entry in self.journal:
            if entry.waits and monotonic() - entry.ticket.stats.submitted > longest:
                if entry.epoch is not None and self._engine is not None:
                    self._engine.channel.send(wire.End(entry.id, 0))
                self._fail(entry, PenstockError(Kind.BUSY, busy))

    def _finish_delivered(self) -> None:
        assert self.ready is not None
        for entry in self.journal:
            reason = entry.over(self.ready.eos_ids) if entry.life.is_open else None
            if reason is not None:
                self._finish(entry, reason)

    # The engine's end: it is dead when it has been reaped and all it had sent was read.

    def _exited(self, engine: _Engine, code: int) -> None:
        engine.code = code
        if engine.closed:
            self._dead(engine)
        else:
            # Whoever else might hold its end of the socket must not keep a dead engine's channel open.
            asyncio.get_running_loop().call_later(1.0, self._closed, engine, None)

    def _closed(self, engine: _Engine, error: str | None) -> None:
        if engine.closed:
            return
        engine.closed = True
        engine.verdict = engine.verdict or error
        engine.channel.close()
        if engine.code is not None:
            self._dead(engine)
        else:
            patience = 2.0 if error is None else 0.0
            asyncio.get_running_loop().call_later(patience, engine.process.kill, False, 0.0)

    def _dead(self, engine: _Engine) -> None:
        assert engine.code is not None
        self._engine = None
        view = engine.process.page.read()
        engine.process.page.close()
        why = describe_exit(engine.code)
        if engine.verdict:
            why = f"{engine.verdict}, {why}"
        suspects = accused(self.journal, view.rows)
        words = engine.process.last_words
        memory = None if engine.verdict else memory_sign(engine.code, words, self.status)
        lowered = self.warden.notches.count > 0
        expected = self._life.ends_by_order
        self.observer.gone(self.status, None if expected else why)
        self.status = None
        if not expected:
            self._deaths.say(why, memory, words)
            if memory is not None:
                self.warden.notches.lower(monotonic())
        for entry in convicted(self.journal, suspects, memory=memory is not None, lowered=lowered):
            _log.error("request %d ended the engine twice by itself, and fails", entry.id)
            died = "The engine died twice while computing this request."
            self._fail(entry, PenstockError(Kind.ENGINE_DIED, died))
            self._life.progressed()
        for ticket in {entry.ticket for entry in self.journal if entry.epoch is not None}:
            ticket.stats.restarts += 1
        for entry in self.journal:
            if not entry.engine_died():
                self.journal.drop(entry)
        by_itself = not view.rows and memory is None
        at_work, room = bool(suspects), self._has_room()
        self._act(self._life.died(monotonic(), why, at_work=at_work, by_itself=by_itself, room=room))
        if not expected and self._life.state is m.State.RESTARTING:
            _log.warning("a new engine is being started; %d open sequences go on in it", len(self.journal))

    def _look(self) -> None:
        """The watch's period: is the engine hung?"""
        loop = asyncio.get_running_loop()
        self._watch_timer = loop.call_later(self._limits.interval, self._look)
        self.observer.look()
        self._drop_overdue()
        engine = self._engine
        if engine is None or engine.verdict is not None:
            return
        budget = self.warden.look(engine.process.pid, self.status, monotonic())
        if budget is not None:
            engine.channel.send(budget)
        busy = len(self.journal) > 0 or self._life.state is not m.State.READY
        self._rest(engine, busy)
        still = engine.watch.hung(monotonic(), engine.process.page.read(), busy)
        if still is not None:
            engine.verdict = f"it made no progress for {still:.0f} s"
            _log.error("the engine hangs: %s; it is being replaced", engine.verdict)
            self._act(self._life.hung())

    def _rest(self, engine: _Engine, busy: bool) -> None:
        """Nothing has been asked for in a while: what is not needed goes back to the system."""
        part = self._idle.look(monotonic(), busy)
        if part is None:
            return
        self.given_back[part] = int(time())
        say = _log.debug if part is Part.POOL else _log.info
        say("no request for a while: the %s was given back", part.replace("_", " "))
        if part is Part.ENGINE:
            self._act(self._life.unload(monotonic()))
        else:
            engine.channel.send(wire.Release(part is Part.CACHE))
