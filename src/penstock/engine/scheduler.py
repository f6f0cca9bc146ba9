"""Decides what the next step runs, or what must be done first. Pure: no MLX, no clock, no I/O.

`schedule(sequences, facts, room)` returns a `Plan` or one `Measure`. The loop applies a measure, reads the
facts anew and asks again; each frees bytes, ends a sequence or takes one on board, so the rounds are bounded.
Sequences are read, never changed.

A plan: rows that grow, rows that decode, at most one prefill chunk, and the bytes of the step's transient, so
that the ledger can grant all of it before anything is launched. Measures for bytes that last (a row, a growth
step), in order: clear the allocator's pool, evict cached segments, stop admitting, preempt the youngest row,
pass the budget up to the ceiling where one row is left, end that one request. For a transient the chunk
shrinks first, down to its floor. The oldest row is never preempted, so it ends, hence every row ends.

Who waits comes on board by age, but whoever finds most of its prompt in the cache comes first: it saves
that prefill, and would not if others took its prefix's place. Where the first in line does not fit yet,
younger ones that do may pass it, too: otherwise one large prompt leaves the budget half empty while it
waits for its share. Whoever has ended before enough rows have ended for it, both at the latest, passes
for nothing (backfilling). The others may pass with `OVERTAKING` times its own ids in all, so a large one,
preempted or not, waits for what is in proportion to itself; then the board drains until it fits.

Cached bytes that somebody is expected to ask for (`Room.recent`) go only for the prompt that would get
the next chunk: any other would but sit on their room. A row that starts from a prefix and does not fit
beside it was promised the prefix's own bytes (`Sequence.reuse`), and needs that much less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from penstock.engine.sequence import Sequence
from penstock.memory.costs import CHUNK_FLOOR, FIRST_ROOM, Costs, grown
from penstock.memory.predict import Transient

LONE_CHUNK = 1.5
"""Stall targets that a chunk may take while nobody streams: a new request waits for it, and perhaps for one
more chunk that is owed to the oldest, and shall have its first id within three."""
OVERTAKING = 3
"""Of its own ids: rows with room for that many may go on board before one that waits for room."""
LOOK_AHEAD = 32
"""How many that wait are looked at in a step."""


@dataclass(frozen=True, slots=True)
class Room:
    """The ledger's side of a decision, in bytes."""

    free: int
    """What can be reserved now."""
    pool: int = 0
    """What clearing the allocator's pool would free."""
    evictable: int = 0
    """What evicting cached segments would free."""
    recent: int = 0
    """Of `evictable`, what was used just now or is waited for: it goes only for a prompt that is next."""
    slack: int = 0
    """From the budget up to the ceiling: a row that is alone on board may use it, so that it can end."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a decision rests on besides the sequences. Times in seconds."""

    decode_concurrency: int
    prompt_concurrency: int
    chunk_longest: int
    stall_target: float
    costs: Costs
    transient: Transient
    correction: float = 1.0
    """How far measured transients exceed predicted ones at the moment. Shapes chunks, never admission."""
    seconds_per_prefill_id: float | None = None
    """Measured on the last chunks; None before the first."""
    departures: int = 0
    """Counts rows that left and rises of the budget: a preempted sequence comes back only after one, after
    its second preemption only after two, and so on."""
    apart: bool = False
    """The next step is a suspect's, if there is one: it runs alone (see `penstock.guilt`)."""
    stacked: tuple[int, ...] = ()
    """Ids of the sequences whose recurrent states are stacked now; another batch needs a new stack."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of prompt ids of one sequence to compute: `length` ids from `sequence.launched` on."""

    sequence: Sequence
    length: int
    decided_by: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work; an empty one means that nothing can run before something arrives or ends."""

    grow: tuple[tuple[Sequence, int], ...] = ()
    """Rows and their new capacities."""
    decode: tuple[Sequence, ...] = ()
    chunk: Chunk | None = None
    transient: int = 0
    """Bytes that the step may hold beyond its rows."""

    def __bool__(self) -> bool:
        return bool(self.decode) or self.chunk is not None

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Who takes part."""
        return self.decode if self.chunk is None else (*self.decode, self.chunk.sequence)


@dataclass(frozen=True, slots=True)
class Admit:
    """Give a waiting sequence a row of this capacity, perhaps past an older one that does not fit yet."""

    sequence: Sequence
    capacity: int
    past: Sequence | None = None

    def book(self) -> None:
        """Count what was let past, when it goes on board."""
        if self.past is not None:
            self.past.overtaken += self.capacity


@dataclass(frozen=True, slots=True)
class ClearPool:
    """Give the allocator's pool back to the system."""


@dataclass(frozen=True, slots=True)
class Evict:
    """Drop cached segments until `size` more bytes are free; for a sequence, but what it can start from."""

    size: int
    sequence: Sequence | None = None


@dataclass(frozen=True, slots=True)
class Preempt:
    """Take a row's memory; its sequence waits and is computed again later."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the one sequence on board, or the first that waits: with all the rest gone it does not fit."""

    sequence: Sequence


Measure = Admit | ClearPool | Evict | Preempt | GiveUp


def schedule(sequences: Iterable[Sequence], facts: Facts, room: Room) -> Plan | Measure:
    """The next step's work, or what has to happen before it."""
    ordered = sorted(sequences, key=lambda s: s.arrival)
    on_board = [s for s in ordered if s.row is not None]
    free = room.free
    stepping = _company(on_board, facts.apart)
    decode = tuple(s for s in stepping if s.decodable)
    grow = tuple((s, _next_capacity(s)) for s in decode if s.launched + 1 > s.capacity)
    lasting, transient = _step_bytes(decode, grow, facts)
    free -= lasting + transient
    if measure := _make_room(-free, room, on_board):
        return measure
    streams_run = any(s.decodable for s in on_board)
    # The rows' draws are read before the chunk is launched: what the rows held is free by then.
    chunk = _chunk([s for s in stepping if s.prefill_left], streams_run, facts, free + transient)
    if chunk is not None:
        needed = facts.transient.prefill(chunk.length, chunk.sequence.launched)
        free -= max(0, needed - transient)
        transient = max(transient, needed)
        if measure := _make_room(-free, room, on_board):
            return measure
    return _admission(ordered, on_board, facts, room, free) or Plan(grow, decode, chunk, transient)


def reads_first(decision: Plan | Measure) -> bool:
    """Whether the step in flight is read before this: its transient goes then, and a row may end.

    A chunk's launch would hide it; a row that takes over its prefix must not meet its errors.
    """
    if isinstance(decision, Plan):
        return decision.chunk is not None
    return not isinstance(decision, Admit) or decision.sequence.reuse > 0


def _company(on_board: list[Sequence], apart: bool) -> list[Sequence]:
    """Whose step it is: everybody's, or, where there are suspects, one of theirs and the others' by turns."""
    suspects = [s for s in on_board if s.apart]
    if not suspects:
        return on_board
    others = [s for s in on_board if not s.apart]
    return others if not apart and any(s.decodable or s.prefill_left for s in others) else suspects[:1]


def _next_capacity(sequence: Sequence) -> int:
    return min(grown(sequence.launched + 1), sequence.limit)


def _growth_step(sequence: Sequence, facts: Facts) -> int:
    """Bytes of the next growth of a row, whenever it comes."""
    return max(0, facts.costs.growth(sequence.capacity, min(grown(sequence.capacity), sequence.limit)))


def _step_bytes(
    decode: tuple[Sequence, ...], grow: tuple[tuple[Sequence, int], ...], facts: Facts
) -> tuple[int, int]:
    """Lasting and transient bytes of decoding these rows, some of which grow first."""
    if not decode:
        return 0, 0
    lasting = sum(facts.costs.growth(s.capacity, new) for s, new in grow)
    moving = max((facts.costs.moving(s.capacity) for s, _ in grow), default=0)
    regroup = facts.costs.states * len(decode) if tuple(s.id for s in decode) != facts.stacked else 0
    costly, lean = sum(s.costly_draw for s in decode), sum(s.lean_draw for s in decode)
    drawing = facts.transient.decode((s.launched + 1 for s in decode), costly, lean)
    return lasting, drawing + moving + regroup


def _make_room(lacking: int, room: Room, on_board: list[Sequence]) -> Measure | None:
    """The next measure for bytes that the rows on board cannot do without; None: nothing lacks, or can."""
    if lacking <= 0:
        return None
    if room.pool > 0:
        return ClearPool()
    if room.evictable > 0:
        return Evict(lacking)
    if len(on_board) > 1:
        return Preempt(on_board[-1])
    return GiveUp(on_board[0]) if on_board and lacking > room.slack else None


def _admission(
    ordered: list[Sequence], on_board: list[Sequence], facts: Facts, room: Room, free: int
) -> Measure | None:
    """Take a waiting sequence on board, or make room for it at nobody's cost; None: all wait."""
    waiting = [s for s in ordered if s.row is None]
    if not waiting or len(on_board) >= facts.decode_concurrency:
        return None
    head = waiting[0]
    allowed = OVERTAKING * head.first_capacity - head.overtaken
    until = _steps_until(head, on_board, facts, room.free + room.pool + room.evictable)
    prompts = [s.expected_prefill for s in on_board if s.prefill_left]
    for sequence in sorted(waiting[:LOOK_AHEAD], key=lambda s: not s.comes_back):
        if len(prompts) >= facts.prompt_concurrency and sequence.prefill_left:
            continue
        next_up = sequence.expected_prefill < min(prompts, default=sequence.expected_prefill + 1)
        delays = sequence is not head and sequence.steps_left >= min(until, FIRST_ROOM)
        if delays and sequence.first_capacity > allowed:
            continue
        measure = _entry(sequence, on_board, facts, room, free, next_up)
        if measure is not None:
            return replace(measure, past=head) if delays and isinstance(measure, Admit) else measure
    return None


def _steps_until(sequence: Sequence, on_board: list[Sequence], facts: Facts, free: int) -> int:
    """In how many steps, at the latest, enough rows have ended for it: or all, if that is not enough.

    `free` without the present step's transient, which is gone by then.
    """
    lacking, ends = entry_bytes(sequence, sequence.first_capacity, facts) - free, 0
    needed = 0 if sequence.preempted_at is None else sequence.preempted_at + sequence.preemptions
    for count, row in enumerate(sorted(on_board, key=lambda s: s.steps_left)):
        if lacking <= 0 and facts.departures + count >= needed:
            break
        lacking -= facts.costs.row(row.capacity)
        ends = row.steps_left
    return ends


def _entry(
    sequence: Sequence, on_board: list[Sequence], facts: Facts, room: Room, free: int, next_up: bool
) -> Measure | None:
    """Take this sequence on board, or make room for it if it is `next_up`; None: it waits."""
    if on_board and not sequence.may_return(facts.departures):
        return None
    headroom = sum(_growth_step(s, facts) for s in on_board) if sequence.preemptions else 0
    capacity = sequence.first_capacity
    lacking = entry_bytes(sequence, capacity, facts) + headroom - free
    if lacking > 0 and not on_board:
        # Alone it may start with less room for its answer: what was accepted must be able to run.
        capacity = min(capacity, sequence.least_capacity)
        lacking = entry_bytes(sequence, capacity, facts) - free
    short = lacking
    if sequence.reuse:
        taking = facts.costs.taking(capacity)
        short = entry_bytes(sequence, capacity, facts, taking) + headroom - free - sequence.reuse
    if short <= 0:
        return Admit(sequence, capacity)
    if lacking <= room.pool + room.evictable - (0 if next_up else room.recent):
        return ClearPool() if room.pool > 0 else Evict(short, sequence)
    never = not on_board and lacking > room.pool + room.evictable + room.slack
    return GiveUp(sequence) if never else None


def entry_bytes(sequence: Sequence, capacity: int, facts: Facts, taking: int = 0) -> int:
    """A row, and the costliest step it will ask for at the floor: what could not end is not begun.

    `taking`: bytes of the step in which it takes over its prefix.
    """
    length = len(sequence.tokens)
    floor = min(CHUNK_FLOOR, length)
    drawing = facts.transient.decode([length], sequence.costly_draw)
    step = max(facts.transient.prefill(floor, length - floor), drawing, taking)
    return facts.costs.row(capacity) + facts.costs.states + step + sequence.host_bytes


def _chunk(prompts: list[Sequence], streams_run: bool, facts: Facts, free: int) -> Chunk | None:
    """The next chunk; the floor, if no longer one fits into `free` bytes, whether or not the floor does."""
    if not prompts:
        return None
    sequence = choose_prompt(prompts)
    length, why = facts.chunk_longest, "prefill_step_size"
    seconds = facts.stall_target * (1 if streams_run else LONE_CHUNK)
    speed = facts.seconds_per_prefill_id or seconds / CHUNK_FLOOR  # unknown: it may be a slow device
    if (within := max(CHUNK_FLOOR, int(seconds / speed))) < length:
        length, why = within, "stall target"
    if sequence.prefill_left <= length:
        length, why = sequence.prefill_left, "end of prompt"
    if sequence.until_cut < length:
        length, why = sequence.until_cut, "checkpoint"
    fits = facts.transient.longest_chunk(int(free / facts.correction), sequence.launched, length)
    if fits < length:
        length, why = max(fits, min(CHUNK_FLOOR, length)), "memory"
    return Chunk(sequence, length, why)


def choose_prompt(prompts: list[Sequence]) -> Sequence:
    """The prompt whose chunk is next: the least left, unless the oldest has been passed over for too long.

    `passed_over` counts the prefill ids that others got since the oldest's own last chunk less its own, so
    the oldest gets at least every other chunk's worth of ids.
    """
    oldest = min(prompts, key=lambda s: s.arrival)
    shortest = min(prompts, key=lambda s: (s.expected_prefill, s.arrival))
    return oldest if oldest.passed_over > 0 else shortest


def account(chunk: Chunk, prompts: Iterable[Sequence]) -> None:
    """Book a chunk that is being launched: `passed_over` of every prompt that waits on."""
    for prompt in prompts:
        if prompt is chunk.sequence:
            prompt.passed_over = max(0, prompt.passed_over - chunk.length)
        else:
            prompt.passed_over += chunk.length
