"""The journal: everything the front needs to carry an open sequence into another engine.

Owns the entries of all sequences that an engine may know of. An id is written here before a client sees it,
so that what was delivered can be told to the next engine, and never twice to the client. Ids of sequences are
never used again. Pure but for the entries it holds: who is resubmitted, who is over and who is guilty are
functions of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from penstock import wire
from penstock.supervisor.machine import SequenceLife
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
    accused_at: int | None = None
    """The position at which it was accused of an engine's death."""

    @property
    def position(self) -> int:
        """How far its ids have been computed, as far as the front knows."""
        return len(self.job.prompt) + len(self.delivered) if self.delivered else self.prefilled

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
        )

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
        self._entries.pop(entry.id, None)

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


def guilty(entries: Iterable[Entry], accused: Mapping[int, int]) -> list[Entry]:
    """Judges a death: returns who must fail, and notes who is now under suspicion.

    `accused`: position by id of the rows that the page names as running; where it names none of the open
    ones, all that the engine knew are suspects. Guilty is a suspect that was one before and has not advanced.
    """
    known = [entry for entry in entries if entry.epoch is not None]
    suspects = [(entry, accused[entry.id]) for entry in known if entry.id in accused]
    if not suspects:
        suspects = [(entry, entry.position) for entry in known]
    found = []
    for entry, position in suspects:
        if entry.accused_at is not None and position <= entry.accused_at:
            found.append(entry)
        entry.accused_at = position
    return found
