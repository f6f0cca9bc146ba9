"""Figures of a run, what counts as lost, and how two servers are compared."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser

import pytest

from penstock.traffic.client import Record
from penstock.traffic.report import listed, markdown, page, rows, spread, summary
from penstock.traffic.watch import Run

RECORDS = [
    Record(0, 0, status=503, error="503 server_busy"),
    Record(0, 0, again=True, status=200, prompt_tokens=90, cached_tokens=30, answer_tokens=10),
    Record(0, 1, status=200, left=True),
    Record(1, 0, status=200, error="broken"),
    Record(1, 1, error="refused"),
    Record(2, 0, status=200, prompt_tokens=10, answer_tokens=10, first=2.0, gaps=[0.1, 0.3]),
]


def test_a_loss_is_a_request_whose_last_try_failed() -> None:
    found = summary([Run(RECORDS, 4.0, [(0.1, 900_000_000), (0.2, 1_500_000_000)])])
    assert (found["requests"], found["answered"], found["left"], found["lost"]) == (6, 2, 1, 2)
    assert found["errors"] == {"503 server_busy": 1, "broken": 1, "refused": 1}
    assert found["cached_share"] == 0.3
    assert (found["answer_tokens_per_second"], found["prompt_tokens_per_second"]) == (5.0, 25.0)
    assert found["first_token"] == {"p50": 2.0, "p95": 2.0, "p99": 2.0, "max": 2.0}
    assert found["peak_bytes"] == 1_500_000_000


def test_rounds_are_added_up_and_a_retry_counts_in_its_own_round() -> None:
    failed, whole = Record(0, 0, error="broken"), Record(0, 0, status=200, prompt_tokens=10, first=0.5)
    found = summary([Run([failed], 1.0, []), Run([whole], 3.0, [(0.0, 7)])])
    assert (found["lost"], found["answered"], found["seconds"], found["peak_bytes"]) == (1, 1, 4.0, 7)


def test_each_kind_of_request_has_times_of_its_own() -> None:
    mixed = [
        Record(0, 0, first=9.0, status=200),
        Record(1, 0, kind="fim", first=0.2, status=200, left=True),
        Record(2, 0, kind="count", status=200, total=0.1, prompt_tokens=500),
        Record(3, 0, kind="count", status=404, total=0.3, error="404"),
    ]
    found = summary([Run(mixed, 10.0, [])])
    assert {kind: times["p50"] for kind, times in found["first_token_by_kind"].items()} == {
        "chat": 9.0, "fim": 0.2, "count": 0.1,
    }  # fmt: skip
    assert found["errors"] == {"count: 404": 1}
    assert found["prompt_tokens"] == 0, "what is only counted is not computed"
    assert summary([Run(mixed[:1], 1.0, [])])["first_token_by_kind"] == {}
    assert ["first token, fim, p99", "200.0 ms"] in rows({"x": found})


def test_known_quantiles() -> None:
    values = [float(n) for n in range(101)]
    random.Random(1).shuffle(values)
    assert spread(values) == {"p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert spread([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0, "max": 3.0}
    assert spread([]) is None


def test_two_servers_are_compared_and_above_one_is_better() -> None:
    asked = {"status": 200, "prompt_tokens": 10, "answer_tokens": 4}
    slow = summary([Run([Record(0, 0, first=2.0, **asked)], 4.0, [(0, 8_000_000_000)])])
    fast = summary([Run([Record(0, 0, first=0.5, **asked)], 2.0, [(0, 2_000_000_000)])])
    table = {name: cells for name, *cells in rows({"slow": slow, "fast": fast})}
    assert table[""] == ["slow", "fast", "fast : slow"]
    assert table["first token, p50"] == ["2.00 s", "500.0 ms", "4.00 ×"]
    assert table["answer tokens a second"] == ["1.0", "2.0", "2.00 ×"]
    assert table["peak memory"] == ["8.0 GB", "2.0 GB", "4.00 ×"]
    assert table["lost"] == ["0", "0", ""]
    assert table["between tokens, p50"] == ["–", "–", ""]
    assert [len(row) for row in rows({"a": slow, "b": slow, "c": slow})] == [4] * len(rows({"a": slow}))


def test_nothing_at_all_is_a_report_too() -> None:
    table = rows({"nobody": summary([Run([], 0.0, [])])})
    assert ["first token, p50", "–"] in table
    assert ["errors", "none"] in table


def test_the_table_is_markdown_with_straight_edges() -> None:
    lines = markdown([["", "one", "three"], ["time", "1 s", "22.5 s"]]).splitlines()
    assert lines == ["|      | one |  three |", "| ---- | --: | -----: |", "| time | 1 s | 22.5 s |"]


def test_counts_are_listed_for_people() -> None:
    assert listed({"b": 2, "a": 1, "c": 0}) == "1 × a, 2 × b"
    assert listed({}) == "none"


class Outside(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, value) for name, value in attrs if name in ("src", "href", "action")]


@pytest.mark.parametrize("name", ["penstock", "</script><script>alert(1)</script>"])
def test_the_page_holds_everything_and_loads_nothing(name: str) -> None:
    run = Run(RECORDS, 4.0, [(0.1, 900_000_000)])
    data = {"about": name, "table": rows({name: summary([run])}), "runs": {name: [run.told()]}}
    shown = page(json.dumps(data))
    parser = Outside()
    parser.feed(shown)
    assert parser.found == []
    assert "url(" not in shown
    assert "@import" not in shown
    held = shown.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(held) == json.loads(json.dumps(data))
