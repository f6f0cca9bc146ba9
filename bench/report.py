"""Figures from time stamps, ratios with their spread, and the table. Pure: no clock, no process, no file.

A row's *arrivals* are the times of its ids. The *steady window* of a batch is the time in which every row is
decoding: from the last row's first id to the first row's last id. A step's time is the gap between a row's
ids inside that window, so that prefill and the batch's end don't count in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

Figures = dict[str, float]
LOWER_IS_BETTER = {
    "ttft_p50_ms",
    "ttft_max_ms",
    "itl_p50_ms",
    "itl_p90_ms",
    "step_ms",
    "total_s",
    "peak_mb",
    "peak_over_idle_mb",
    "decode_over_idle_mb",
    "device_over_idle_mb",
    "kv_mb",
    "front_us_per_token",
}


def percentile(values: Sequence[float], share: float) -> float:
    """The value at `share` (0..1) of the sorted values, nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def gaps(arrivals: Sequence[float]) -> list[float]:
    """Seconds between one id and the next."""
    return [after - before for before, after in pairwise(arrivals)]


def steady_window(rows: Iterable[Sequence[float]]) -> tuple[float, float]:
    """When all rows were decoding; empty (start ≥ end) where they never overlapped."""
    rows = list(rows)
    return max(row[0] for row in rows), min(row[-1] for row in rows)


def timings(sent: Sequence[float], rows: Sequence[Sequence[float]]) -> Figures:
    """Time to first token, inter-token latency, step time and throughput of one batch of rows."""
    start, end = steady_window(rows)
    first = [row[0] - at for at, row in zip(sent, rows, strict=True)]
    between = [gap for row in rows for gap in gaps(row)]
    steady = [gap for row in rows for gap in gaps([t for t in row if start <= t <= end])]
    tokens, seconds = sum(map(len, rows)), max(row[-1] for row in rows) - min(sent)
    figures = {
        "ttft_p50_ms": 1e3 * median(first),
        "ttft_max_ms": 1e3 * max(first),
        "itl_p50_ms": 1e3 * median(between),
        "itl_p90_ms": 1e3 * percentile(between, 0.9),
        "tokens_per_s": tokens / seconds,
        "total_s": seconds,
        "steady_s": max(end - start, 0.0),
    }
    if steady:
        in_window = sum(start < t <= end for row in rows for t in row)
        figures["step_ms"] = 1e3 * len(rows) * (end - start) / in_window
        figures["steady_tokens_per_s"] = in_window / (end - start)
    return figures


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spreads(rounds: Sequence[Figures]) -> dict[str, Spread]:
    """Each figure that every round has, over the rounds."""
    shared = [key for key in rounds[0] if all(key in figures for figures in rounds)] if rounds else []
    return {key: Spread.of([figures[key] for figures in rounds]) for key in shared}


def ratios(base: Sequence[Figures], other: Sequence[Figures]) -> dict[str, Spread]:
    """How many times better `other` is than `base`, round by round (> 1: better), over the rounds."""
    found: dict[str, list[float]] = {}
    for before, after in zip(base, other, strict=False):
        for key in before.keys() & after.keys() - {"steady_s"}:
            top, bottom = (before[key], after[key]) if key in LOWER_IS_BETTER else (after[key], before[key])
            if bottom > 0 and top > 0:
                found.setdefault(key, []).append(top / bottom)
    return {key: Spread.of(values) for key, values in sorted(found.items())}


COLUMNS = [
    ("ttft_p50_ms", "TTFT p50 ms"),
    ("ttft_max_ms", "TTFT max ms"),
    ("itl_p50_ms", "ITL p50 ms"),
    ("itl_p90_ms", "ITL p90 ms"),
    ("step_ms", "step ms"),
    ("tokens_per_s", "tok/s"),
    ("steady_tokens_per_s", "steady tok/s"),
    ("peak_mb", "peak MB"),
    ("decode_over_idle_mb", "decode − idle MB"),
    ("device_over_idle_mb", "device − idle MB"),
    ("kv_mb", "KV and states MB"),
    ("front_us_per_token", "front µs/tok"),
]


def table(results: dict[str, dict[str, list[Figures]]], base: str) -> str:
    """Markdown: per case, a line per system (median, min–max over the rounds), then ratios to `base`."""
    lines: list[str] = []
    for case, systems in results.items():
        columns = [
            (key, title) for key, title in COLUMNS if any(key in f for r in systems.values() for f in r)
        ]
        lines += ["", f"### {case}", "", _line(["", *(title for _, title in columns)])]
        lines.append("|---" * (len(columns) + 1) + "|")
        for system, rounds in systems.items():
            found = spreads(rounds)
            lines.append(_line([system, *(str(found.get(key, "–")) for key, _ in columns)]))
        for before, system in _pairs(systems, base):
            found = ratios(systems[before], systems[system])
            cells = [f"{found[key]} ×" if key in found else "–" for key, _ in columns]
            lines.append(_line([f"**{system} : {before}**", *cells]))
    return "\n".join(lines)


def _pairs(systems: dict[str, list[Figures]], base: str) -> list[tuple[str, str]]:
    """What is compared: servers with `base`, raw loops with each other, each server with its own raw loop."""
    raw = [system for system in systems if system.startswith("raw ")]
    pairs = [(base, system) for system in systems if system != base and system not in raw]
    pairs += [(raw[0], other) for other in raw[1:]]
    pairs += [(loop, system) for loop in raw for system in systems if system.startswith(loop[4:])]
    return [(before, system) for before, system in pairs if systems.get(before) and systems[system]]


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
