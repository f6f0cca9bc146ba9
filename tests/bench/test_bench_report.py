"""Figures, ratios and the table, from made-up time stamps."""

from __future__ import annotations

import pytest

from bench import report


def test_steady_window_leaves_out_prefill_and_tail() -> None:
    alone = [0.5, 0.6, 0.7]
    fast = [*alone, *(1.0 + 0.25 * step for step in range(5))]
    late = [1.0 + 0.25 * step for step in range(8)]
    figures = report.timings([0.0, 0.1], [fast, late])
    assert report.steady_window([fast, late]) == (1.0, 2.0)
    assert figures["step_ms"] == pytest.approx(250)
    assert figures["steady_tokens_per_s"] == pytest.approx(8)
    assert figures["ttft_max_ms"] == pytest.approx(900)
    assert figures["tokens_per_s"] == pytest.approx(16 / 2.75)


def test_coalesced_ids_do_not_shorten_the_step() -> None:
    even = [1.0 + 0.1 * step for step in range(11)]
    pairs = [1.0] + [1.2 + 0.2 * (step // 2) for step in range(10)]
    assert report.timings([0.0], [even])["step_ms"] == pytest.approx(100)
    assert report.timings([0.0], [pairs])["step_ms"] == pytest.approx(100)


def test_rows_that_never_met_have_no_step() -> None:
    figures = report.timings([0.0, 0.0], [[1.0, 2.0], [3.0, 4.0]])
    assert "step_ms" not in figures
    assert figures["steady_s"] == 0


def test_ratios_are_taken_round_by_round_and_above_one_is_better() -> None:
    base = [{"step_ms": 40.0, "tokens_per_s": 10.0}, {"step_ms": 80.0, "tokens_per_s": 5.0}]
    ours = [{"step_ms": 10.0, "tokens_per_s": 30.0}, {"step_ms": 40.0, "tokens_per_s": 10.0}]
    found = report.ratios(base, ours)
    assert found["step_ms"] == report.Spread(3.0, 2.0, 4.0)
    assert found["tokens_per_s"] == report.Spread(2.5, 2.0, 3.0)


def test_table_has_a_line_per_system_and_per_ratio() -> None:
    results = {"dense": {"a": [{"step_ms": 4.0}], "b": [{"step_ms": 2.0}], "failed": []}}
    lines = report.table(results, "a").splitlines()
    assert "| b | 2 (2–2) |" in lines
    assert "| **b : a** | 2 (2–2) × |" in lines
    assert "| failed | – |" in lines


def test_servers_are_compared_with_the_base_and_with_their_own_loops() -> None:
    one = [{"step_ms": 1.0}]
    results = {"dense": {"mlx_lm.server": one, "penstock": one, "raw mlx_lm": one, "raw penstock": one}}
    heads = [
        line.split("**")[1] for line in report.table(results, "mlx_lm.server").splitlines() if "**" in line
    ]
    assert heads == [
        "penstock : mlx_lm.server",
        "raw penstock : raw mlx_lm",
        "mlx_lm.server : raw mlx_lm",
        "penstock : raw penstock",
    ]
