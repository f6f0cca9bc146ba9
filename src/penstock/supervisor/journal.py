"""The journal: everything the front needs to carry an open sequence into another engine.

Owns the entries of all sequences that an engine may know of. An id is written here before a client sees it,
so that what was delivered can be told to the next engine, and never twice to the client. Ids of sequences are
never used again. Pure but for the entries it holds: who is resubmitted, who is over and who is accused are
functions of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from penstock import wire
from penstock.guilt import Accusation, Span, judge, judge_memory
from penstock.page import Row
from penstock.supervisor.machine import SequenceLife, SequenceState
from penstock.supervisor.ticket import Job, Ticket


@dataclass(slots=True, eq=False)
class Entry:
    """An open sequence. `epoch`: the engine that knows it, None while none does."""

    id: int
    choice: int
    job: Job
    sampling: wire.Sampling
    ticket: Ticket
    life: SequenceLife = field(default_factory=SequenceLife)
    delivered: array[int] = field(default_factory=lambda: array("I"))
    epoch: int | None = None
    prefilled: int = 0
    stage: str = "queued"
    """What the present engine has computed of it last: nothing (queued), prefill, decode."""
    told: float = 0.0
    """When its last ids came, by `time.monotonic`; 0: none have."""
    furthest: int = 0
    """How far its prefill ever came in any engine."""
    accusation: Accusation | None = None
    """What is held against it, of the engines' deaths."""

    @property
    def on_board(self) -> bool:
        """The present engine has computed something of it, so it holds memory there."""
        return self.stage != "queued"

    @property
    def length(self) -> int:
        return len(self.job.prompt) + len(self.delivered)

    @property
    def waits(self) -> bool:
        """Nothing of it has been computed by the present engine."""
        return self.life.is_open and not self.prefilled and not self.delivered

    def submit(self) -> wire.Submit:
        job = self.job
        return wire.Submit(
            id=self.id,
            prompt=wire.pack_ids(job.prompt),
            sampling=self.sampling,
            arrival=self.id,
            delivered=wire.pack_ids(self.delivered),
            max_tokens=job.max_tokens,
            min_tokens=job.min_tokens,
            ignore_eos=job.ignore_eos,
            namespace=job.namespace,
            borders=list(job.borders),
            turn=job.turn,
            stops=job.stops,
            grammar=job.grammar,
            apart=self.accusation.span[1] if self.accusation is not None and self.accusation.apart else 0,
        )

    def prefill_came(self, done: int) -> bool:
        """Notes progress of its prefill. True: it never came so far."""
        further = done > max(self.furthest, self.length if self.delivered else 0)
        self.prefilled, self.stage = done, "prefill"
        self.furthest = max(self.furthest, done)
        return further

    def engine_died(self) -> bool:
        """True: it goes on in the next engine."""
        self.epoch, self.prefilled, self.stage = None, 0, "queued"
        return self.life.engine_died()

    @property
    def computed(self) -> int:
        """How many of its ids have been computed at one time or another."""
        return max(self.furthest, self.length - 1 if self.delivered else 0)

    def over(self, eos_ids: Collection[int]) -> str | None:
        """The reason, if its last id was delivered but the engine died before it could say so."""
        job, count = self.job, len(self.delivered)
        if job.max_tokens is not None and count >= job.max_tokens:
            return "length"
        ended_turn = count > job.min_tokens and not job.ignore_eos and self.delivered[-1] in eos_ids
        return "stop" if ended_turn else None


class Journal:
    """The open sequences, by id."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._last_id = 0
        self._generated = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def new_ids(self, count: int) -> list[int]:
        """Ids in order of arrival, never given before."""
        first = self._last_id + 1
        self._last_id += count
        return list(range(first, first + count))

    def add(self, entry: Entry) -> None:
        self._entries[entry.id] = entry

    def get(self, id: int) -> Entry | None:
        return self._entries.get(id)

    def drop(self, entry: Entry) -> None:
        if self._entries.pop(entry.id, None) is not None:
            self._generated += len(entry.delivered)

    @property
    def generated(self) -> int:
        """Ids generated for all that ever was here."""
        return self._generated + sum(len(entry.delivered) for entry in self._entries.values())

    def facts(self) -> dict[str, int]:
        """How many there are, by their lives, for /health."""
        entries = list(self)
        return {
            "open": sum(entry.life.is_open for entry in entries),
            "ending": sum(entry.life.state is SequenceState.ENDING for entry in entries),
            "unsent": sum(entry.life.is_open and entry.epoch is None for entry in entries),
            "waiting": self.waiting()[0],
            "journal_bytes": self.bytes,
        }

    def waiting(self) -> tuple[int, int]:
        """How many sequences wait, and their ids."""
        lengths = [entry.length for entry in self._entries.values() if entry.waits]
        return len(lengths), sum(lengths)

    @property
    def bytes(self) -> int:
        """Bytes of ids held; a prompt shared by several choices counts once."""
        prompts = {id(entry.job): len(entry.job.prompt) for entry in self._entries.values()}
        return 4 * (sum(prompts.values()) + sum(len(e.delivered) for e in self._entries.values()))


def in_order_of_resubmission(entries: Iterable[Entry]) -> list[Entry]:
    """Shortest remaining prefill first (a new engine has computed nothing), then by arrival."""
    return sorted(entries, key=lambda entry: (entry.length, entry.id))


def accused(entries: Iterable[Entry], running: Iterable[Row]) -> list[tuple[Entry, Span]]:
    """The open sequences among the rows that a dead engine's page names as running, each with its span.

    Where it names none nobody is accused: the engine died by itself.
    """
    spans = {id: (start, end) for id, start, end in running}
    return [(e, spans[e.id]) for e in entries if e.id in spans and e.life.is_open and e.epoch is not None]


def convicted(
    entries: Iterable[Entry], suspects: list[tuple[Entry, Span]], *, memory: bool, lowered: bool
) -> list[Entry]:
    """Who fails for a death; `memory`: it looked like that; `lowered`: the budget was lowered before."""
    if not memory:
        return judge(suspects)
    on_board = {e.id for e in entries if e.on_board} | {e.id for e, _ in suspects}
    return judge_memory(suspects, sole=len(on_board) == 1, lowered=lowered)
