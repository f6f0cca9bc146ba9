"""The life of the engine and of a sequence, as pure state machines: no clock, no asyncio, no I/O.

An event is a method call with the time in it; what is to be done comes back as actions. `EngineLife` decides
when an engine is started, killed or given up; `SequenceLife` sees to it that whatever the order of cancel,
text stop, end of turn, length and engine death, the API hears exactly one end. `Watch` tells a hung engine
from a slow one and from a front that was itself asleep.

    loading ──ready──▶ ready ──died──▶ restarting ──ready──▶ ready
       │ ▲              └──unload──▶ unloaded                     any ──stop──▶ stopping
       │ └────────────wanted────────────┘
       │ halt, or deaths in a row: three while loading, three of idle engines, eight without progress
       └──────────────▶ halted
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from penstock.errors import Kind
from penstock.page import Phase, View


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    UNLOADED = "unloaded"
    HALTED = "halted"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start an engine process."""


@dataclass(frozen=True, slots=True)
class Kill:
    """End the engine process; `stacks`: let it dump its threads' stacks first."""

    stacks: bool


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Call `tick` at this time."""

    at: float


@dataclass(frozen=True, slots=True)
class SubmitOpen:
    """Hand all open sequences to the engine."""


@dataclass(frozen=True, slots=True)
class FailOpen:
    """Fail all open sequences."""

    kind: Kind
    message: str


@dataclass(frozen=True, slots=True)
class AskExit:
    """Tell the engine to finish its step and exit."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """Nothing runs any more, nothing will be started."""


Action = Spawn | Kill | WaitUntil | SubmitOpen | FailOpen | AskExit | Stopped


@dataclass(frozen=True, slots=True)
class Policy:
    """Times in seconds."""

    loading_deaths: int = 3
    """In a row: a model that never came up is given up; one that has served is loaded again and again, but
    nobody waits for it longer than that."""
    idle_deaths: int = 3
    """In a row, of engines that were ready and had begun nothing."""
    stuck_deaths: int = 8
    """In a row, of engines at work that got no further. Finding who is guilty takes four at most."""
    backoff: float = 0.5
    longest_backoff: float = 30.0
    exit_grace: float = 10.0
    memory_wait: float = 10.0
    """The longest that a restart waits until the system has a dead engine's memory back."""
    memory_look: float = 0.2


class EngineLife:
    """When an engine is started, killed or given up."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.state = State.LOADING
        self.reason: str | None = None
        self.deaths = 0
        self._alive = False
        self._leaving = False
        self._patience = 0.0
        self._fruitless = 0
        self._idle_deaths = 0
        self._stuck_deaths = 0
        self._loading_deaths = 0
        self._has_served = False
        self._due: float | None = None

    @property
    def ends_by_order(self) -> bool:
        """The engine's end, when it comes, is no death."""
        return self._leaving or self.state in (State.HALTED, State.STOPPING)

    def start(self) -> list[Action]:
        return self._spawn()

    def ready(self) -> list[Action]:
        if self.state not in (State.LOADING, State.RESTARTING):
            return []
        self.state, self.reason = State.READY, None
        self._loading_deaths, self._has_served = 0, True
        return [SubmitOpen()]

    def progressed(self) -> None:
        """Something was computed since the last death that never was before, or the guilty was found."""
        self._fruitless = self._idle_deaths = self._stuck_deaths = 0

    def unload(self, now: float) -> list[Action]:
        """Nobody needs the engine: it ends until somebody does."""
        if self.state is not State.READY:
            return []
        self.state = State.UNLOADED
        return self._ask_exit(now)

    def wanted(self) -> list[Action]:
        """A request has come."""
        if self.state is not State.UNLOADED:
            return []
        self.state = State.LOADING
        return [] if self._alive else self._spawn()

    def died(
        self, now: float, why: str, *, at_work: bool = False, by_itself: bool = False, room: bool = True
    ) -> list[Action]:
        """The engine process is gone, or could not be started.

        `at_work`: it was computing something; `by_itself`: it was not, and nobody else ended it; `room`: the
        system could hold the next one.
        """
        self._alive, left, self._leaving = False, self._leaving, False
        if self.state is State.HALTED:
            return []
        if self.state is State.STOPPING:
            return [Stopped()]
        if left:
            return self._spawn() if self.state is State.LOADING else []
        loading = self.state is not State.READY
        self.deaths += 1
        self._fruitless += 1
        self._loading_deaths += loading
        self._idle_deaths += by_itself and not loading
        self._stuck_deaths += at_work
        lost: list[Action] = []
        if self._loading_deaths >= self.policy.loading_deaths:
            told = f"the engine died {self._loading_deaths} times in a row while loading, at last {why}"
            if not self._has_served:
                return self._give_up(told)
            lost.append(FailOpen(Kind.ENGINE_DIED, f"The model cannot be served now: {told}"))
        if self._idle_deaths >= self.policy.idle_deaths or self._stuck_deaths >= self.policy.stuck_deaths:
            times = max(self._idle_deaths, self._stuck_deaths)
            return self._give_up(f"the engine died {times} times in a row without progress, at last {why}")
        self.state, self.reason = State.RESTARTING, why
        delay = self.policy.backoff * 2.0 ** min(self._fruitless - 2, 30) if self._fruitless > 1 else 0.0
        self._due = now + min(delay, self.policy.longest_backoff)
        self._patience = self._due + self.policy.memory_wait
        return [*lost, WaitUntil(self._due)] if delay else [*lost, *self.tick(now, room)]

    def halt(self, why: str) -> list[Action]:
        """The engine says that a restart would not mend it, and ends. Believed of one that never served."""
        if self.state in (State.HALTED, State.STOPPING) or self._has_served:
            return []
        return self._give_up(why)

    def hung(self) -> list[Action]:
        return [Kill(stacks=True)] if self._alive else []

    def stop(self, now: float) -> list[Action]:
        """The server ends: the open sequences have ended or been failed."""
        loading = self.state in (State.LOADING, State.RESTARTING)
        self.state, self.reason = State.STOPPING, None
        if not self._alive:
            return [Stopped()]
        if loading:
            # It would hear the request only when the load is done, and has nothing to lose.
            return [Kill(stacks=False)]
        return self._ask_exit(now)

    def tick(self, now: float, room: bool = True) -> list[Action]:
        """What was waited for is due; `room`: the system could hold the next engine."""
        if self._due is None or now < self._due:
            return []
        self._due = None
        if self.state is State.RESTARTING and not self._alive:
            if room or now >= self._patience:
                return self._spawn()
            self._due = now + self.policy.memory_look
            return [WaitUntil(self._due)]
        return [Kill(stacks=False)] if self._leaving and self._alive else []

    def _ask_exit(self, now: float) -> list[Action]:
        self._leaving = True
        self._due = now + self.policy.exit_grace
        return [AskExit(), WaitUntil(self._due)]

    def _spawn(self) -> list[Action]:
        self._alive = True
        return [Spawn()]

    def _give_up(self, why: str) -> list[Action]:
        self.state, self.reason = State.HALTED, why
        actions: list[Action] = [FailOpen(Kind.ENGINE_HALTED, f"The model cannot be served: {why}")]
        return [*actions, Kill(stacks=False)] if self._alive else actions


class SequenceState(Enum):
    OPEN = "open"
    ENDING = "ending"
    """The API has its end; the engine's last word is still to come."""
    ENDED = "ended"


class SequenceLife:
    """open → ending → ended. Each method says whether the event counts; what does not is void."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = SequenceState.OPEN

    @property
    def is_open(self) -> bool:
        """Ids of this sequence are for the API; false: they came late and are dropped."""
        return self.state is SequenceState.OPEN

    def end(self, engine_knows: bool) -> bool:
        """The front ends it (text stop, cancel). True: tell the API its end, and the engine if it knows."""
        if self.state is not SequenceState.OPEN:
            return False
        self.state = SequenceState.ENDING if engine_knows else SequenceState.ENDED
        return True

    def ended(self) -> bool:
        """The engine's last word (end of turn, length, cut, error). True: tell the API."""
        was_open = self.state is SequenceState.OPEN
        self.state = SequenceState.ENDED
        return was_open

    def engine_died(self) -> bool:
        """True: it goes on in the next engine."""
        if self.state is SequenceState.ENDING:
            self.state = SequenceState.ENDED
        return self.state is SequenceState.OPEN


@dataclass(frozen=True, slots=True)
class HangLimits:
    """Times in seconds without progress; `interval` is the watch's own period."""

    floor: float = 30.0
    slack: float = 10.0
    """Times the predicted duration of the sub-step."""
    loading: float = 300.0
    """CUDA compiles kernels at a model's first start: 125 seconds were seen without a sign of life."""
    first: float = 120.0
    """For the first step of a new shape, which may compile, too."""
    interval: float = 1.0
    kill_grace: float = 3.0
    """From SIGABRT, which dumps the stacks, to SIGKILL."""


class Watch:
    """Judges one engine from its page: hung is work without any sign of progress for too long."""

    def __init__(self, limits: HangLimits, now: float) -> None:
        self._limits = limits
        self._seen: tuple[int, int, int] | None = None
        self._since = now
        self._moved = now
        self.stalled: float | None = None
        """Seconds without a sign of life, once that is half of a hang; an idle engine gives signs."""
        self._last_look = now

    def hung(self, now: float, view: View, busy: bool) -> float | None:
        """Seconds without progress if that is too long, else None. To be called every `interval`."""
        lagged = now - self._last_look > 3 * self._limits.interval
        self._last_look = now
        seen = (view.sequence, view.steps, view.beats)
        if seen != self._seen or lagged:
            self._moved = now
        quiet = now - self._moved
        self.stalled = quiet if quiet > self._limit(view) / 2 else None
        if seen != self._seen or lagged or not busy:
            # A front that was asleep has seen nothing: it must not judge by a gap of its own making.
            self._seen, self._since = seen, now
            return None
        still = now - self._since
        return still if still > self._limit(view) else None

    def _limit(self, view: View) -> float:
        if view.phase in (Phase.LOADING, Phase.PROBE):
            return self._limits.loading
        if view.phase is Phase.FIRST_OF_SHAPE:
            return self._limits.first
        return max(self._limits.floor, self._limits.slack * view.predicted)
