"""An engine that computes nothing: the real scheduler, accounts, ledger and sequences over a runner that only
counts bytes, and a clock that moves when a step is waited for.

Its turns are the loop's: at most one step in flight, launched before the one before it is read, but for
chunks, which are read first. What the laws of the engine are is asserted here, at every launch and at the
end, so that whoever plays it, by rules or by traffic, cannot forget to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.support.laws import conserves

from penstock.engine import scheduler
from penstock.engine.accounts import Accounts
from penstock.engine.scheduler import Admit, Chunk, ClearPool, Evict, Facts, GiveUp, Plan, Preempt
from penstock.engine.sequence import Sequence
from penstock.memory.costs import CHUNK_FLOOR, Costs, Fit
from penstock.memory.ledger import Account, Lease
from penstock.memory.predict import MARGIN, Correction, Scalars, Transient
from penstock.wire import Sampling, Submit

COSTS = Costs(kv_per_token=1000, layer_per_token=100, fixed=5_000, states=2_000, buffers=8)
TRANSIENT = Transient(Scalars(10_000, 300, 0.5), Scalars(5_000, 2_000, 0.1))
FACTS = Facts(4, 2, 2048, 0.2, COSTS, TRANSIENT)
WEIGHTS = 5_000_000
CONTEXT = 20_000
EOS = 1


@dataclass
class Row:
    """A row's place in the stack of recurrent states."""

    open: bool = True


@dataclass
class Step:
    """A launched step: what it computes, what it really holds beyond its rows, and when it will be done."""

    rows: tuple[Sequence, ...]
    chunk: Chunk | None
    lease: Lease
    launched_at: float
    drawn_at: float
    done_at: float
    orphans: int


@dataclass
class Times:
    """Seconds on the device: a + b · ids + c · ids · context of a chunk, d + e · rows of a decode step."""

    chunk: float = 0.01
    per_id: float = 0.001
    per_pair: float = 1e-8
    decode: float = 0.02
    per_row: float = 0.001

    def of(self, rows: int, chunk: Chunk | None) -> tuple[float, float]:
        decode = self.decode + self.per_row * rows if rows else 0.0
        if chunk is None:
            return decode, 0.0
        pairs = chunk.length * chunk.sequence.launched
        return decode, self.chunk + self.per_id * chunk.length + self.per_pair * pairs


@dataclass
class Life:
    """What is known of one request."""

    asked: float
    """When it was sent; the engine may see it later."""
    prompt: int
    stop: int
    first_id: float | None = None
    ended: str | None = None
    answer: int = 0


def state(s: Sequence) -> str:
    """What a cancel may find a sequence in."""
    if s.row is None:
        return "queued" if s.preempted_at is None else "preempted"
    if s.launched > s.computed:
        return "in flight"
    if not s.entered:
        return "admitted"
    return "in prefill" if s.prefill_left else "decoding"


@dataclass
class CountingEngine:
    """`ceiling` includes `weights`. `hits`: a preempted row's ids are found again while they are cached."""

    ceiling: int
    facts: Facts = FACTS
    weights: int = WEIGHTS
    context: int = CONTEXT
    hits: bool = True
    caching: bool = True
    times: Times = field(default_factory=Times)
    lie: Callable[[], float] = lambda: 1.0
    """Real transients as a multiple of what is leased for them."""
    wide: Counter[str] = field(default_factory=Counter)
    """Counts of whatever happened."""

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.ceiling, self.weights, self.facts.costs)
        self.longest = Fit(self.facts.costs, self.facts.transient).longest(
            self.ceiling - self.weights, self.context
        )
        self.correction = Correction()
        self.sequences: dict[int, Sequence] = {}
        self.leaving: list[Sequence] = []
        self.cached: dict[int, tuple[Lease, int]] = {}
        self.stack: tuple[Row, ...] = ()
        self.in_flight: Step | None = None
        self.lives: dict[int, Life] = {}
        self.later: list[tuple[float, Callable[[], object]]] = []
        self.clock = 0.0
        self.cancel_next = ""
        """Whoever is found in this state first is cancelled then."""
        self.device_free = 0.0
        self.steps = 0
        self.empty_plans = 0
        self.computed = 0
        self.decode_seconds = 0.0
        self.chunk_seconds: Counter[int] = Counter()
        self.in_use: list[float] = []
        self.most_on_board = 0

    # -- from outside --------------------------------------------------------------------------------

    def accepts(self, length: int) -> bool:
        """The front's rule (`check_length`): a prompt must leave room for one id."""
        return length + 1 <= min(self.longest, self.context)

    def submit(
        self, length: int, max_tokens: int | None = None, stop: int = 1 << 30, asked: float | None = None
    ) -> int:
        """A request whose answer ends by itself after `stop` ids, sent at `asked` (now)."""
        id_ = len(self.lives) + 1
        submit = Submit(
            id=id_, prompt=bytes(4 * length), sampling=Sampling(), arrival=id_, max_tokens=max_tokens
        )
        self.sequences[id_] = Sequence(submit, self.context)
        self.lives[id_] = Life(self.clock if asked is None else asked, length, stop)
        if len(self.sequences[id_].tokens) >= self.sequences[id_].limit:
            self.end(id_, "length")
        return id_

    def at(self, time: float, act: Callable[[], object]) -> None:
        """Something that arrives later; the engine sees it at its next look."""
        self.later.append((time, act))
        self.later.sort(key=lambda pair: pair[0])

    def cancel(self, id_: int) -> None:
        """The front's `End`."""
        self.wide[f"cancelled {state(self.sequences[id_])}"] += 1
        self.end(id_, "cut")

    def set_budget(self, size: int) -> None:
        self.wide["cut" if size < self.accounts.ledger.budget else "rise"] += 1
        self.accounts.set_budget(size)
        if self.accounts.ledger.room < 0:
            self.accounts.clear_pool()
        if self.accounts.ledger.room < 0:
            self._evict(-self.accounts.ledger.room)

    # -- turns ---------------------------------------------------------------------------------------

    def turn(self) -> None:
        self._receive()
        if self.in_flight is not None and self.in_flight.chunk is not None:
            self.read()
            self._receive()
        plan = self.plan()
        launched = self.launch(plan) if plan else None
        self.empty_plans = 0 if plan or self.in_flight else self.empty_plans + 1
        self.read()
        self.in_flight = launched

    def play(self, turns: int) -> None:
        """Turns until everything has ended and nothing more will come."""
        for _ in range(turns):
            if self.in_flight is None and (not self.sequences or self.empty_plans):
                if self.later:
                    self.clock = max(self.clock, self.later[0][0])
                elif not self.sequences:
                    return
            self.turn()
            assert self.empty_plans < 2 or self.later or not self.sequences, (
                "sequences wait, and nothing is planned"
            )
        raise AssertionError(f"not everything has ended after {turns} turns")

    def plan(self) -> Plan:
        for _ in range(4 * len(self.sequences) + len(self.cached) + 8):
            flying = self.in_flight.orphans if self.in_flight is not None else 0
            self.accounts.keep_states(self._orphans() + flying)
            facts = replace(
                self.facts, departures=self.accounts.departures, correction=self.correction.factor
            )
            room = self.accounts.room(sum(lease.size for lease, _ in self.cached.values()))
            decision = self.decide(facts, room)
            if isinstance(decision, Plan):
                if self._enter(decision):
                    continue
                if decision:
                    self.accounts.restore_pool(decision.transient)
                return decision
            if self.in_flight is not None and not isinstance(decision, Admit):
                self.read()
                continue
            self._apply(decision)
        raise AssertionError("the rounds do not end")

    def decide(self, facts: Facts, room: scheduler.Room) -> Plan | scheduler.Measure:
        return scheduler.schedule(self.sequences.values(), facts, room)

    def launch(self, plan: Plan) -> Step:
        for s, capacity in plan.grow:
            self.wide["grown"] += 1
            self.accounts.grow(s, capacity)
        lease = self.accounts.begin(plan.transient)
        self._check_bound(plan)
        orphans = self._orphans()
        decode_time, chunk_time = self.times.of(len(plan.decode), plan.chunk)
        if plan.decode:
            self.stack = tuple(s.row for s in plan.decode)
            self.facts = replace(self.facts, stacked=tuple(s.id for s in plan.decode))
        for s in plan.decode:
            assert s.launched + 1 <= s.capacity, "a row is written beyond its room"
            s.launched += 1
            self.computed += 1
        if plan.chunk is not None:
            s, length = plan.chunk.sequence, plan.chunk.length
            assert length >= min(CHUNK_FLOOR, s.prefill_left, s.until_cut)
            assert s.launched + length <= s.capacity, "a chunk is written beyond its row's room"
            scheduler.account(plan.chunk, [other for other in self.sequences.values() if other.prefill_left])
            s.launched += length
            self.computed += length
            self.chunk_seconds[s.id] += chunk_time  # type: ignore[assignment]
        self.decode_seconds += decode_time
        self.steps += 1
        begun = max(self.clock, self.device_free)
        self.device_free = begun + decode_time + chunk_time
        gone = max(0, orphans - self._orphans())
        drawn = begun + decode_time
        return Step(plan.decode, plan.chunk, lease, self.clock, drawn, self.device_free, gone)

    def read(self) -> None:
        step, self.in_flight = self.in_flight, None
        left = list(self.leaving)
        if step is None:
            return
        self.clock = max(self.clock, step.drawn_at if step.rows else step.done_at)
        for s in step.rows:
            if self.sequences.get(s.id) is s:
                self._drawn(s)
        self.clock = max(self.clock, step.done_at)
        if step.chunk is not None:
            s = step.chunk.sequence
            speed = (self.clock - step.launched_at) / step.chunk.length
            before = self.facts.seconds_per_prefill_id
            speed = speed if before is None else (speed + before) / 2
            self.facts = replace(self.facts, seconds_per_prefill_id=speed)
            if self.sequences.get(s.id) is s:
                s.computed += step.chunk.length
        granted = self.accounts.ledger.balance(Account.TRANSIENT)
        self.correction.observe(granted, int(granted / MARGIN * self.lie() * MARGIN))
        self.accounts.ledger.release(step.lease)
        for s in left:
            self.leaving.remove(s)
            s.computed = min(s.launched, len(s.tokens))
            self._leave(s)

    def end(self, id_: int, reason: str) -> None:
        s = self.sequences.pop(id_)
        life = self.lives[id_]
        life.ended, life.answer = reason, len(s.tokens) - s.prompt_length
        if s.row is None:
            return
        self.accounts.departures += 1
        if s.launched > s.computed:
            self.leaving.append(s)
        else:
            self._leave(s)

    # -- laws ----------------------------------------------------------------------------------------

    def _check_bound(self, plan: Plan) -> None:
        """Everything that the step may hold is within the budget in force, or one row is left on board."""
        ledger = self.accounts.ledger
        on_board = [s for s in self.sequences.values() if s.row is not None]
        self.most_on_board = max(self.most_on_board, len(on_board))
        if len(on_board) == 1:
            assert ledger.held <= self.ceiling
            if ledger.held > ledger.budget:
                assert not ledger.balance(Account.POOL), "the budget was passed beside a full pool"
                assert not self.cached, "the budget was passed beside a full cache"
                assert plan.chunk is None or plan.chunk.length <= CHUNK_FLOOR
        else:
            assert ledger.held <= ledger.budget, f"{ledger.held} held of {ledger.budget}"
        if len(self.sequences) > len(on_board):
            self.wide["waited"] += 1
            if len(on_board) < self.facts.decode_concurrency:
                self.in_use.append(ledger.held / max(1, ledger.budget))
        self.wide["shortened"] += plan.chunk is not None and plan.chunk.decided_by == "memory"

    def close(self) -> None:
        """Nothing is left: leases, cached bytes, the audit's findings, the sums."""
        assert not self.sequences
        assert not self.leaving
        assert self.in_flight is None
        self.accounts.keep_states(self._orphans())
        leases = [lease for lease, _ in self.cached.values()]
        active = self.weights + sum(lease.size for lease in leases)
        found = self.accounts.audit({}, leases, active)
        assert not found, [str(finding) for finding in found]
        self._evict(1 << 60)
        ledger = self.accounts.ledger
        assert not self.accounts.rows
        assert ledger.held == self.weights + ledger.balance(Account.POOL)
        assert conserves(ledger)
        assert ledger.buffers == 0

    def useful(self) -> int:
        """Ids that had to be computed: prompts and answers of those that have ended."""
        return sum(life.prompt + life.answer for life in self.lives.values())

    # -- inside --------------------------------------------------------------------------------------

    def _receive(self) -> None:
        while self.later and self.later[0][0] <= self.clock:
            self.later.pop(0)[1]()
        for s in list(self.sequences.values()):
            if self.cancel_next == state(s):
                self.cancel(s.id)
                self.cancel_next = ""

    def _drawn(self, s: Sequence) -> None:
        life = self.lives[s.id]
        nth = len(s.tokens) - s.prompt_length + 1
        s.tokens.append(EOS if nth >= life.stop else 7)
        s.computed = len(s.tokens) - 1
        life.first_id = self.clock if life.first_id is None else life.first_id
        reason = s.finish_reason(frozenset([EOS]))
        if reason is not None:
            self.end(s.id, reason)

    def _enter(self, plan: Plan) -> bool:
        new = [s for s in plan.sequences if not s.entered]
        for s in new:
            s.entered = True
            _, found = self.cached.get(s.id, (None, 0))
            s.launched = s.computed = min(found, len(s.tokens) - 1) if self.hits else 0
        return bool(new)

    def _apply(self, measure: scheduler.Measure) -> None:
        self.wide[type(measure).__name__] += 1
        match measure:
            case Admit(s, capacity):
                measure.book()
                self.wide["passed"] += measure.past is not None
                self.accounts.admit(s, capacity)
                s.row = Row()
            case ClearPool():
                self.accounts.clear_pool()
            case Evict(size):
                self._evict(size)
            case Preempt(s):
                oldest = min(o.arrival for o in self.sequences.values() if o.row is not None)
                assert s.arrival > oldest, "the oldest was preempted"
                self._preempt(s)
                s.preempt(self.accounts.departures)
            case GiveUp(s):
                answered = len(s.tokens) > s.prompt_length
                assert answered or not self.accepts(s.prompt_length), "an accepted request was refused"
                self.end(s.id, "length" if answered else "error")

    def _preempt(self, s: Sequence) -> None:
        """As the prompt cache does: the row's lease becomes the cache's, and nothing is copied."""
        if not self.caching or not s.computed:
            self._close(s)
            return
        lease = self.accounts.rows.pop(s.id)
        self.accounts.ledger.move(lease, Account.CACHED)
        self.accounts.ledger.correct(lease, self.facts.costs.kv_per_token * s.capacity, 4)
        self._close_row(s)
        self._store(s, lease)

    def _leave(self, s: Sequence) -> None:
        """As the prompt cache does: keys and values are copied, if there is room, before the row goes."""
        size = self.facts.costs.kv_per_token * s.computed
        if self.caching and s.computed and self.accounts.ledger.can_reserve(size):
            lease = self.accounts.ledger.reserve(Account.CACHED, size, 4)
            assert lease is not None
            self._store(s, lease)
        self._close(s)

    def _store(self, s: Sequence, lease: Lease) -> None:
        if s.id in self.cached:
            self.accounts.ledger.release(self.cached.pop(s.id)[0])
        self.cached[s.id] = lease, s.computed

    def _close(self, s: Sequence) -> None:
        self._close_row(s)
        self.accounts.leave(s)

    def _close_row(self, s: Sequence) -> None:
        s.row.open = False
        s.row = None
        if not any(row.open for row in self.stack):
            self.stack = ()

    def _orphans(self) -> int:
        return sum(not row.open for row in self.stack)

    def _evict(self, size: int) -> None:
        while size > 0 and self.cached:
            lease, _ = self.cached.pop(next(iter(self.cached)))
            size -= lease.size
            self.accounts.ledger.release(lease)
