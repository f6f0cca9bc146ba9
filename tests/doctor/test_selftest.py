"""The self-test's choice of a budget, its judgement, and the whole of it with a real server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from penstock import cli, models
from penstock.doctor import selftest
from penstock.doctor.selftest import Seen, SelfTestProblem
from penstock.traffic.client import Record
from penstock.traffic.profiles import PROFILES, Event
from penstock.traffic.report import summary
from penstock.traffic.watch import Run

EVENTS = [
    Event(0, 0, 0.0, (("s", 100),), (("a", 50),), 10),
    Event(0, 1, 0.0, (("s", 100),), (("b", 500),), 10),
    Event(1, 0, 0.0, (("s", 100),), (("c", 60),), 10),
]
LONGEST = 100 + 50 + 10 + 500 + 10 + selftest.MARGIN
PLAN = {
    "weights_bytes": 1_000_000,
    "kv_bytes_per_token": 100,
    "step_bytes_at_longest": 400_000,
    "longest": 8_192,
    "context_length": 8_192,
    "ceiling_bytes": 10_000_000,
}


def holds(limit: int) -> Mapping[str, Any]:
    """A machine that needs two million bytes to compute and 300 a token."""
    left = (limit - 2_000_000) // 300
    return {"fits": left > 0, "longest": left} if left > 0 else {"fits": False}


def test_the_budget_is_about_the_least_that_takes_the_longest() -> None:
    limit = selftest.budget(holds, PLAN, EVENTS)
    assert holds(limit)["longest"] >= LONGEST
    smaller = holds(int(limit / 1.2) - 1)
    assert not smaller["fits"] or smaller["longest"] < LONGEST


@pytest.mark.parametrize("changes", [{"ceiling_bytes": 1_500_000}, {"context_length": 600}])
def test_a_storm_that_does_not_fit_is_not_begun(changes: dict[str, int]) -> None:
    def short(limit: int) -> Mapping[str, Any]:
        most = changes.get("context_length", 8_192)
        found = holds(limit)
        return {**found, "longest": min(found.get("longest", 0), most)}

    with pytest.raises(SelfTestProblem, match=f"its {LONGEST:,} tokens of context do not fit"):
        selftest.budget(short, {**PLAN, **changes}, EVENTS)


WHOLE = summary([Run([Record(0, 0, status=200, first=0.5, prompt_tokens=9)], 3.0, [(0.0, 9_000_000)])])
FINE = Seen(held=90, ceiling=100, deaths=0, counts={"evict": 3, "preempt": 0}, exit_code=0)


def test_a_passed_storm() -> None:
    kept, text = selftest.report({"versions": "v", "machine": "m"}, WHOLE, FINE)
    assert kept
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert lines["self-test"] == "passed"
    assert lines["measures"] == "3 × evict"
    assert "90% of it" in lines["budget"]


@pytest.mark.parametrize(
    "seen",
    [
        replace(FINE, held=101),
        replace(FINE, held=0),
        replace(FINE, deaths=1),
        replace(FINE, exit_code=-11),
        replace(FINE, exit_code=None),
    ],
)
def test_a_storm_that_broke_a_promise(seen: Seen) -> None:
    kept, text = selftest.report({}, WHOLE, seen)
    assert not kept
    assert text.startswith("self-test    FAILED")


def test_a_lost_request_is_a_broken_promise() -> None:
    lost = summary([Run([Record(0, 0, error="broken")], 1.0, [])])
    kept, text = selftest.report({}, lost, FINE)
    assert not kept
    assert "1 lost" in text
    assert "1 × broken" in text


def test_the_whole_storm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real server with about the least memory: all answered, something evicted, no path told."""
    monkeypatch.setenv("PENSTOCK_API_KEY", "not-for-the-storm")
    monkeypatch.setitem(PROFILES, "storm", lambda scale: PROFILES["issue1390"](0, scale, 5, (18_000, 60_000)))
    assert cli.main(["doctor", "--self-test", "--json", "--scale", "0.02"]) == 0
    told = json.loads(capsys.readouterr().out)
    lines = dict(line.split(maxsplit=1) for line in told["self_test"].splitlines())
    assert lines["self-test"] == "passed"
    assert "0 lost" in lines["requests"]
    assert lines["engine"].startswith("0 deaths")
    assert any(measure in lines["measures"] for measure in ("evict", "preempt"))
    assert str(models.DEMO) not in told["self_test"]


def test_a_server_that_does_not_come_up_is_one_sentence() -> None:
    with pytest.raises(SelfTestProblem, match=r"did not come up \(exit code 2\)"):
        selftest.run(models.DEMO, 1_000_000, EVENTS)
