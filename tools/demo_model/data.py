"""Token arrays for training: the documentation as one stream, conversations packed in rows.

A conversation row starts with the start of a conversation, as every prompt does. Each token carries a
weight class: 1 where the model should speak (documentation, assistant turns), 0 for the rest.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tools.demo_model.corpus import Document

Ids = npt.NDArray[np.uint16]
_BATCH = 2000


def stream_ids(tokenizer: Tokenizer, documents: list[Document]) -> Ids:
    """All documents' tokens in one array, each after <|endoftext|>."""
    parts: list[list[int]] = []
    for encoding in tokenizer.encode_batch_fast([d.text for d in documents]):
        parts += [[tokenizer.token_to_id("<|endoftext|>") or 0], encoding.ids]
    return np.fromiter(itertools.chain.from_iterable(parts), dtype=np.uint16)


def pack(
    tokenizer: Tokenizer, texts: Iterable[str], rows: int, length: int
) -> tuple[Ids, npt.NDArray[np.uint8]]:
    """``rows`` rows of length + 1 ids with their weight classes; what doesn't fit in a row is cut off."""
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = np.full((rows, length + 1), end, dtype=np.uint16)
    spoken = np.zeros((rows, length + 1), dtype=np.uint8)
    row, at = 0, 0
    for one in _encoded(tokenizer, texts):
        if at > length - 32:
            row, at = row + 1, 0
            if row == rows:
                break
        cut = one[: length + 1 - at]
        ids[row, at : at + len(cut)] = cut
        spoken[row, at : at + len(cut)] = _spoken(tokenizer, cut)
        at += len(cut) + 1
    return ids, spoken


def save(path: Path, **arrays: Any) -> None:
    """Write the arrays in one compressed file."""
    np.savez_compressed(path, **arrays)


def _encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Ids]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, _BATCH)):
        for encoding in tokenizer.encode_batch_fast(batch):
            yield np.array(encoding.ids, dtype=np.uint16)


def _spoken(tokenizer: Tokenizer, ids: Ids) -> npt.NDArray[np.uint8]:
    """1 for the tokens of assistant turns with their <|im_end|>, 0 elsewhere."""
    marks = np.zeros(len(ids), dtype=np.uint8)
    opening = np.array(tokenizer.encode("<|im_start|>assistant\n").ids, dtype=np.uint16)
    ends = np.flatnonzero(ids == tokenizer.token_to_id("<|im_end|>"))
    for start in np.flatnonzero(ids == opening[0]):
        after = start + len(opening)
        if np.array_equal(ids[start:after], opening):
            later = ends[ends >= after]
            marks[after : (later[0] + 1 if len(later) else len(ids))] = 1
    return marks
