"""What a sequence costs, in bytes and buffers, and what fits: arithmetic shared by scheduler, front and plan.

A row costs its capacity (not its length) times the bytes of a token over all growing layers, plus what does
not grow: recurrent states and full sliding windows. While it grows one layer exists twice. Invariant: a
row is charged for what it may write before it writes it, so `row(capacity)` is never below what is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.memory.predict import Transient

FIRST_ROOM = 1024
"""Ids of an answer that a row has room for from the start; what is longer grows by steps."""
GROWTH = 256
"""Ids a full row grows by at least; long ones grow by an eighth, so that growing stays linear."""
SEGMENT = 512
"""Ids of a segment of the prompt cache at most."""
CHUNK_FLOOR = 256
"""Ids that a prefill chunk has at least, if the prompt has them: below it a GPU idles."""


def grown(length: int) -> int:
    """The capacity of a row that has to hold `length` ids and has no room for them."""
    return length + max(GROWTH, length // 8)


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes of a model's rows. `layer_per_token`: of the layer with the widest keys and values."""

    kv_per_token: int
    layer_per_token: int
    fixed: int
    states: int
    """Of `fixed`, the recurrent states, which exist twice while the batch changes."""
    buffers: int
    """Live buffers of a row."""
    rounding: int = 0
    """By how much they may be larger than was asked for, all together."""

    def row(self, capacity: int) -> int:
        """Bytes of a row with room for `capacity` ids."""
        return self.fixed + self.rounding + self.kv_per_token * capacity

    def growth(self, old: int, new: int) -> int:
        """Lasting bytes of growing a row's capacity."""
        return self.kv_per_token * (new - old)

    def moving(self, old: int) -> int:
        """Transient bytes of growing a row: the old buffers of one layer, while the new ones are filled."""
        return self.layer_per_token * old

    def taking(self, capacity: int) -> int:
        """Transient bytes of a row of this capacity that takes over its prefix: one of its layers, while the
        prefix still has all of its own; or one segment of all layers."""
        return max(self.moving(capacity), self.kv_per_token * min(SEGMENT, capacity))


@dataclass(frozen=True, slots=True)
class Fit:
    """What a budget holds beside the weights."""

    costs: Costs
    transient: Transient

    def alone(self, length: int) -> int:
        """Bytes that one row needs, alone on board, to reach `length` ids, prompt and answer together.

        The row with one growth step behind it, that step's transient, and the costlier of the last prefill
        chunk at the floor length and a decode step.
        """
        floor = min(CHUNK_FLOOR, length)
        step = max(self.transient.prefill(floor, length - floor), self.transient.decode([length]))
        return self.costs.row(grown(length)) + self.costs.moving(length) + step + self.costs.states

    def longest(self, room: int, most: int) -> int:
        """The longest sequence, at most `most` ids, that `room` bytes hold; 0 if none does."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.alone(middle) <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def side_by_side(self, room: int, length: int, answer: int = FIRST_ROOM) -> int:
        """How many sequences of `length` ids, with room for `answer` more, run at once in `room` bytes."""
        count = 0
        while self.together(count + 1, length, answer) <= room and count < 10_000:
            count += 1
        return count

    def together(self, count: int, length: int, answer: int = FIRST_ROOM) -> int:
        """Bytes of `count` such sequences while they decode and one of them still prefills its last chunk."""
        capacity = length + min(answer, FIRST_ROOM) + 1
        floor = min(CHUNK_FLOOR, length)
        step = self.transient.prefill(floor, length - floor) + self.transient.decode([capacity] * count)
        return count * (self.costs.row(capacity) + self.costs.states) + step
