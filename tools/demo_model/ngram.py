"""The yardstick: a byte 5-gram model with interpolated Kneser-Ney smoothing.

Source: Chen and Goodman, 'An empirical study of smoothing techniques for language modeling', 1999,
section 2.7, one discount per order, estimated from the counts of ones and twos.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ORDER = 5
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Level:
    """Counts of one order: grams with their counts, contexts with total count and distinct followers."""

    grams: Codes
    counts: Codes
    contexts: Codes
    totals: Codes
    followers: Codes
    discount: float


class ByteNgram:
    """Interpolated Kneser-Ney over bytes, trained on one text."""

    def __init__(self, text: bytes) -> None:
        codes = _codes(text, ORDER)
        grams, counts = np.unique(codes, return_counts=True)
        levels = [_level(grams, counts)]
        for order in range(ORDER - 1, 0, -1):
            # Lower orders count in how many contexts a gram occurs, not how often.
            shorter = grams & ((1 << (8 * order)) - 1)
            grams, counts = np.unique(shorter, return_counts=True)
            levels.append(_level(grams, counts))
        self._levels = levels[::-1]

    def bits(self, text: bytes) -> float:
        """Bits for the whole text; its first bytes have zero bytes before them."""
        codes = _codes(bytes(ORDER - 1) + text, ORDER)
        probability = np.full(len(codes), 1 / 256)
        for order, level in enumerate(self._levels, 1):
            gram = codes & ((1 << (8 * order)) - 1)
            count = _look_up(level.grams, level.counts, gram)
            total = _look_up(level.contexts, level.totals, gram >> 8)
            followers = _look_up(level.contexts, level.followers, gram >> 8)
            known = total > 0
            safe = np.maximum(total, 1)
            seen = np.maximum(count - level.discount, 0) / safe
            mixed = seen + level.discount * followers / safe * probability
            probability = np.where(known, mixed, probability)
        return float(-np.log2(probability).sum())


def _codes(text: bytes, order: int) -> Codes:
    """Every run of ``order`` bytes as one integer, the last byte lowest."""
    data = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    size = len(data) - order + 1
    codes = np.zeros(size, dtype=np.int64)
    for i in range(order):
        codes = (codes << 8) | data[i : i + size]
    return codes


def _level(grams: Codes, counts: Codes) -> _Level:
    contexts, first = np.unique(grams >> 8, return_index=True)
    totals = np.add.reduceat(counts, first)
    followers = np.diff(np.append(first, len(grams)))
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    discount = ones / (ones + 2 * twos) if ones and twos else 0.5
    return _Level(grams, counts, contexts, totals, followers, discount)


def _look_up(keys: Codes, values: Codes, wanted: Codes) -> Codes:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
