"""Figures of a run, and what counts as lost."""

from __future__ import annotations

from penstock.traffic.client import Record
from penstock.traffic.report import spread, summary, table


def test_a_loss_is_a_request_whose_last_try_failed() -> None:
    records = [
        Record(0, 0, status=503, error="503 server_busy"),
        Record(0, 0, again=True, status=200, prompt_tokens=90, cached_tokens=30, answer_tokens=10),
        Record(0, 1, status=200, left=True),
        Record(1, 0, status=200, error="broken"),
        Record(1, 1, error="refused"),
        Record(2, 0, status=200, prompt_tokens=10, answer_tokens=10, first=2.0, gaps=[0.1, 0.3]),
    ]
    found = summary(records, 4.0, 1_500_000_000)
    assert (found["requests"], found["answered"], found["left"], found["lost"]) == (6, 2, 1, 2)
    assert found["errors"] == {"503 server_busy": 1, "broken": 1, "refused": 1}
    assert found["cached_share"] == 0.3
    assert found["answer_tokens_per_second"] == 5.0
    assert found["first_token"] == {"p50": 2.0, "p95": 2.0, "max": 2.0}
    shown = table(found)
    assert "6: 2 answered, 1 hung up on" in shown
    assert "1.5 GB" in shown


def test_nothing_at_all_is_a_report_too() -> None:
    shown = table(summary([], 0.0))
    assert "none came" in shown
    assert "not known" in shown


def test_the_spread_of_a_hundred() -> None:
    assert spread([float(n) for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "max": 100.0}
