"""What a run of traffic came to: figures for programs, and a table for people. Pure arithmetic.

A request is lost if its client wanted the answer, did not get a whole one, and no later try of the same
request did. Hanging up is no loss, and neither is a 503 that a retry made good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from penstock.sizes import gigabytes
from penstock.traffic.client import Record


def summary(records: Sequence[Record], seconds: float, peak: int | None = None) -> dict[str, Any]:
    """Figures of a run that took `seconds`; `peak`: bytes the server held at most, if known."""
    final = {(record.session, record.turn): record for record in records}.values()
    whole = [r for r in records if r.error is None and not r.left]
    prompt = sum(r.prompt_tokens for r in whole)
    return {
        "requests": len(records),
        "answered": len(whole),
        "left": sum(r.left for r in records),
        "lost": sum(r.error is not None for r in final),
        "errors": dict(Counter(r.error for r in records if r.error is not None)),
        "seconds": round(seconds, 2),
        "prompt_tokens": prompt,
        "answer_tokens": sum(r.answer_tokens for r in whole),
        "answer_tokens_per_second": round(sum(r.answer_tokens for r in whole) / max(seconds, 1e-9), 2),
        "cached_share": round(sum(r.cached_tokens for r in whole) / max(1, prompt), 4),
        "first_token": spread([r.first for r in records if r.first is not None]),
        "between_tokens": spread([gap for r in records for gap in r.gaps]),
        "peak_bytes": peak,
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 95th percentile and greatest of some seconds; None where there are none."""
    if not values:
        return None
    ordered = sorted(values)
    ranks = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(ordered[round(rank * (len(ordered) - 1))], 4) for name, rank in ranks.items()}


def table(found: dict[str, Any]) -> str:
    """The summary in lines for people."""
    errors = ", ".join(f"{count} × {name}" for name, count in sorted(found["errors"].items())) or "none"
    peak = found["peak_bytes"]
    lines = {
        "requests": f"{found['requests']}: {found['answered']} answered, {found['left']} hung up on",
        "lost": str(found["lost"]),
        "errors": errors,
        "time": f"{found['seconds']:.1f} s",
        "tokens": f"{found['prompt_tokens']:,} prompt, {found['cached_share']:.0%} of them cached; "
        f"{found['answer_tokens']:,} answer, {found['answer_tokens_per_second']:.1f} a second",
        "first token": _seconds(found["first_token"]),
        "between tokens": _seconds(found["between_tokens"]),
        "peak memory": "not known" if peak is None else gigabytes(peak),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _seconds(found: dict[str, float] | None) -> str:
    if found is None:
        return "none came"
    return ", ".join(f"{name} {value:,.3f} s" for name, value in found.items())
