"""The random numbers of sampling: a hash of (seed, choice, position, purpose), and nothing else.

There is no generator with a state, so a draw does not depend on which rows share the batch, on how often a
row was preempted, or on whether its answer is being continued by another process: the same position of the
same choice always gets the same number. Pure Python, equal on every platform; refuses nothing.
"""

from __future__ import annotations

from hashlib import blake2b

TOKEN = "token"  # which id; for a draw over the whole vocabulary, which block of ids
WITHIN = "within"  # which id of the block: one number of 24 bits is too coarse for 150,000 ids
XTC = "xtc"  # whether XTC acts at this position
NARROW = 64
"""A draw from so many ids at most looks for them alone and sorts no vocabulary."""

_BITS = 24


def uniform(seed: int, choice: int, position: int, purpose: str) -> float:
    """A number in [0, 1), a multiple of 2**-24: float32 holds it exactly, so that rounding never makes it 1.

    `seed` may be any integer; `position` is the index that the drawn id will have in prompt + answer.
    """
    key = f"{seed}:{choice}:{position}:{purpose}".encode()
    return (int.from_bytes(blake2b(key, digest_size=4).digest(), "little") >> (32 - _BITS)) * 2.0**-_BITS
