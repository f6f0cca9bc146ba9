"""What runs of traffic came to: figures for programs, and rows of a table for people. Pure arithmetic.

A request is lost if its client wanted the answer, did not get a whole one, and no later try of the same
request did. Hanging up is no loss, and neither is a 503 that a retry made good. Times between tokens are
those between the pieces of a stream: a server that sends several tokens at once has fewer and longer ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.sizes import gigabytes
from penstock.traffic.client import Record
from penstock.traffic.watch import Run

RANKS = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
Figures = dict[str, Any]


def summary(runs: Sequence[Run]) -> Figures:
    """Figures of all rounds against one server together."""
    records = [record for run in runs for record in run.records]
    final = [record for run in runs for record in {(r.session, r.turn): r for r in run.records}.values()]
    whole = [r for r in records if r.error is None and not r.left]
    prompt = sum(r.prompt_tokens for r in whole if r.kind != "count")
    answer = sum(r.answer_tokens for r in whole)
    seconds = max(sum(run.seconds for run in runs), 1e-9)
    return {
        "requests": len(records),
        "answered": len(whole),
        "left": sum(r.left for r in records),
        "lost": sum(r.error is not None for r in final),
        "errors": dict(Counter(_error(r) for r in records if r.error is not None)),
        "seconds": round(seconds, 2),
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "prompt_tokens_per_second": round(prompt / seconds, 2),
        "answer_tokens_per_second": round(answer / seconds, 2),
        "cached_share": round(sum(r.cached_tokens for r in whole) / max(1, prompt), 4),
        "first_token": spread([r.first for r in records if r.first is not None]),
        "first_token_by_kind": _by_kind(records),
        "between_tokens": spread([gap for r in records for gap in r.gaps]),
        "peak_bytes": max((held for run in runs for _, held in run.held), default=None),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Quantiles of some seconds, each a value that was there (nearest rank); None where there are none."""
    if not values:
        return None
    ordered = sorted(values)
    return {name: round(ordered[round(rank * (len(ordered) - 1))], 4) for name, rank in RANKS.items()}


def _error(record: Record) -> str:
    return str(record.error) if record.kind == "chat" else f"{record.kind}: {record.error}"


def _by_kind(records: Sequence[Record]) -> dict[str, Any]:
    """The spread of each kind of request, where there are several; a count's answer is its first token."""
    times = defaultdict(list)
    for record in records:
        answered = record.total if record.kind == "count" and record.error is None else None
        if (first := answered or record.first) is not None:
            times[record.kind].append(first)
    return {kind: spread(found) for kind, found in times.items()} if len(times) > 1 else {}


def page(data: str) -> str:
    """The report as one HTML file that needs nothing else; `data`: the JSON of figures, table and runs."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("DATA</script>", data.replace("</", "<\\/") + "</script>")


def rows(found: Mapping[str, Figures]) -> list[list[str]]:
    """The table: a heading, then a row a figure with a cell a server.

    Of two servers the last column says how many times better the second one is (above 1: better).
    """
    two = len(found) == 2
    table = [["", *found, *([" : ".join(reversed(list(found)))] if two else [])]]
    kinds = sorted({kind for figures in found.values() for kind in figures["first_token_by_kind"]})
    for name, keys, shown, lower in _lines(kinds):
        values = [_inner(figures, keys) for figures in found.values()]
        cells = ["–" if each is None else shown(each) for each in values]
        table.append([name, *cells, *([_ratio(values, lower)] if two else [])])
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    """The table as Markdown, aligned for a terminal, too."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        f"| {name:<{widths[0]}} | " + " | ".join(map(str.rjust, cells, widths[1:])) + " |"
        for name, *cells in (table[0], rule, *table[1:])
    ]
    return "\n".join(lines)


def _ratio(values: Sequence[Any], lower: bool | None) -> str:
    if lower is None or not all(values):
        return ""
    before, after = values
    return f"{before / after if lower else after / before:.2f} ×"


def _lines(kinds: Sequence[str]) -> list[tuple[str, tuple[str, ...], Callable[[Any], str], bool | None]]:
    """Each row's name, where its value is, how that is shown, whether less is better (None: neither)."""
    spreads: dict[str, tuple[str, ...]] = {"first token": ("first_token",)}
    spreads |= {f"first token, {kind}": ("first_token_by_kind", kind) for kind in kinds}
    spreads |= {"between tokens": ("between_tokens",)}
    return [
        ("requests", ("requests",), str, None),
        ("answered", ("answered",), str, None),
        ("hung up on", ("left",), str, None),
        ("lost", ("lost",), str, None),
        ("errors", ("errors",), listed, None),
        ("time", ("seconds",), "{:,.1f} s".format, True),
        ("prompt tokens", ("prompt_tokens",), "{:,}".format, None),
        ("cached share of them", ("cached_share",), "{:.1%}".format, False),
        ("prompt tokens a second", ("prompt_tokens_per_second",), "{:,.1f}".format, False),
        ("answer tokens", ("answer_tokens",), "{:,}".format, None),
        ("answer tokens a second", ("answer_tokens_per_second",), "{:,.1f}".format, False),
        *(
            (f"{name}, {rank}", (*keys, rank), _seconds, True)
            for name, keys in spreads.items()
            for rank in ("p50", "p95", "p99")
        ),
        ("peak memory", ("peak_bytes",), gigabytes, True),
    ]


def _inner(figures: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        figures = (figures or {}).get(key)
    return figures


def listed(counts: Mapping[str, int]) -> str:
    """Names and how often each came, for people."""
    return ", ".join(f"{count} × {name}" for name, count in sorted(counts.items()) if count) or "none"


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"
