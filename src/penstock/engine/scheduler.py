"""Decides what the next step runs. Pure: no MLX, no clock, no I/O; sequences are read, never changed.

`schedule(sequences, facts)` returns a `Plan`: which waiting sequences get a row, which rows decode, and at
most one prefill chunk. Decode rows and the chunk are separate forward passes of the same step, so running
streams wait for one chunk at most; its length comes from the stall target while any row decodes.

Which prompt gets the chunk: the one with the least prefill left, so that a short one does not wait minutes
behind a long one; but the oldest prompt keeps at least half of the prefill, so that it cannot starve.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.engine.sequence import Sequence

CHUNK_FLOOR = 256
"""Ids of prefill that a chunk has at least, whatever the stall target says: below it a GPU idles."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a decision rests on besides the sequences. Times in seconds."""

    decode_concurrency: int
    prompt_concurrency: int
    chunk_longest: int
    stall_target: float
    seconds_per_prefill_id: float | None = None
    """Measured on the last chunks; None before the first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of prompt ids of one sequence to compute: `length` ids from `sequence.launched` on."""

    sequence: Sequence
    length: int
    decided_by: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work."""

    admit: tuple[Sequence, ...] = ()
    decode: tuple[Sequence, ...] = ()
    chunk: Chunk | None = None

    def __bool__(self) -> bool:
        return bool(self.decode) or self.chunk is not None


def schedule(sequences: Iterable[Sequence], facts: Facts) -> Plan:
    """The next step's work. Sequences without a row wait in order of arrival."""
    ordered = sorted(sequences, key=lambda s: s.arrival)
    on_board = [s for s in ordered if s.row is not None]
    admit = _admit([s for s in ordered if s.row is None], on_board, facts)
    rows = on_board + list(admit)
    decode = tuple(s for s in rows if s.decodable)
    return Plan(admit, decode, _chunk([s for s in rows if s.prefill_left], bool(decode), facts))


def _admit(waiting: list[Sequence], on_board: list[Sequence], facts: Facts) -> tuple[Sequence, ...]:
    rows = facts.decode_concurrency - len(on_board)
    prompts = facts.prompt_concurrency - sum(1 for s in on_board if s.prefill_left)
    admitted = []
    for sequence in waiting:
        if rows <= 0 or (sequence.prefill_left and prompts <= 0):
            break
        admitted.append(sequence)
        rows -= 1
        prompts -= bool(sequence.prefill_left)
    return tuple(admitted)


def _chunk(prompts: list[Sequence], streams_run: bool, facts: Facts) -> Chunk | None:
    if not prompts:
        return None
    sequence = choose_prompt(prompts)
    longest, why = facts.chunk_longest, "prefill_step_size"
    if streams_run and facts.seconds_per_prefill_id:
        within = max(CHUNK_FLOOR, int(facts.stall_target / facts.seconds_per_prefill_id))
        if within < longest:
            longest, why = within, "stall target"
    if sequence.prefill_left <= longest:
        return Chunk(sequence, sequence.prefill_left, "end of prompt")
    return Chunk(sequence, longest, why)


def choose_prompt(prompts: list[Sequence]) -> Sequence:
    """The prompt whose chunk is next: the least left, unless the oldest has been passed over for too long.

    `passed_over` counts the prefill ids that others got since the oldest's own last chunk less its own, so
    the oldest gets at least every other chunk's worth of ids.
    """
    oldest = min(prompts, key=lambda s: s.arrival)
    shortest = min(prompts, key=lambda s: (s.prefill_left, s.arrival))
    return oldest if oldest.passed_over > 0 else shortest


def account(chunk: Chunk, prompts: Iterable[Sequence]) -> None:
    """Book a chunk that is being launched: `passed_over` of every prompt that waits on."""
    for prompt in prompts:
        if prompt is chunk.sequence:
            prompt.passed_over = max(0, prompt.passed_over - chunk.length)
        else:
            prompt.passed_over += chunk.length
