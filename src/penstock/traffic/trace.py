"""Traces in Mooncake's form: a JSON object a line, {timestamp, input_length, output_length, hash_ids}.

A timestamp is in milliseconds; each hash id stands for a block of the prompt, 512 tokens if not said
otherwise, and becomes the same words wherever it appears, so that equal prefixes are equal bytes. Requests
come when the trace says, whatever became of those before. Refuses a file with any wrong line, by its number.
"""

from __future__ import annotations

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from penstock.traffic.profiles import Event, Piece


class TraceError(ValueError):
    """A line is not as it should be. One sentence with the file and the line."""


def load(path: Path, speed: float = 1, scale: float = 1, seed: int = 0, block: int = 512) -> list[Event]:
    """The requests of the trace, in order of time.

    `speed` 2: twice as fast; `scale` multiplies lengths; another seed is other text. Raises TraceError,
    OSError.
    """
    events = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                at, pieces, answer = _read(line, block, seed)
            except ValueError as wrong:
                raise TraceError(f"{path}:{number}: {wrong}.") from None
            text = tuple((name, max(1, round(tokens * scale))) for name, tokens in pieces)
            events.append(Event(number, 0, at / 1e3 / speed, (), text, max(1, round(answer * scale))))
    if not events:
        raise TraceError(f"{path} holds no request.")
    start = min(event.pause for event in events)
    events = [replace(event, pause=event.pause - start) for event in events]
    return sorted(events, key=attrgetter("pause"))


def _read(line: str, block: int, seed: int) -> tuple[float, list[Piece], int]:
    """Milliseconds, the prompt, and the length of the answer. Raises ValueError with a phrase."""
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError("this is not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("this is not a JSON object")
    at, ids = row.get("timestamp"), row.get("hash_ids")
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < float("inf"):
        raise ValueError("timestamp must be milliseconds, 0 or more")
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError("hash_ids must be a list of whole numbers")
    length, answer = row.get("input_length"), row.get("output_length")
    if type(length) is not int or type(answer) is not int or length < 1 or answer < 0:
        raise ValueError("input_length and output_length must be whole numbers of tokens")
    if len(ids) not in (length // block, -(-length // block)):
        raise ValueError(f"{len(ids)} hash_ids do not make {length} tokens in blocks of {block}")
    pieces = [(f"{seed} hash {each}", min(block, length - n * block)) for n, each in enumerate(ids)]
    if (rest := length - len(ids) * block) > 0:  # no id covers it, so nobody shares it
        pieces.append((f"{seed} rest {ids} {length}", rest))
    return at, pieces, answer
