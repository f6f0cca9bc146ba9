"""Traces in Mooncake's form: what equal hash ids become, and what is refused, by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.traffic import trace
from penstock.traffic.client import Player
from penstock.traffic.profiles import Event

BLOCK = 16


def row(**changes: Any) -> dict[str, Any]:
    return {"timestamp": 0, "input_length": 40, "output_length": 9, "hash_ids": [1, 2, 3], **changes}


def load(folder: Path, rows: list[Any], **options: Any) -> list[Event]:
    path = folder / "trace.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return trace.load(path, **{"block": BLOCK, **options})


def text(event: Event) -> str:
    return Player("http://x/v1", "m")._text(event.text)


@st.composite
def traces(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Lengths with as many ids as blocks, the last one partial or without an id; times in any order."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, 100))
        counts = (length // BLOCK, -(-length // BLOCK))
        ids = draw(st.lists(st.integers(0, 5), min_size=counts[0], max_size=counts[1]))
        at, answer = draw(st.floats(0, 1e6)), draw(st.integers(0, 50))
        rows.append(row(timestamp=at, input_length=length, output_length=answer, hash_ids=ids))
    return rows


@given(rows=traces(), seed=st.integers(0, 3), speed=st.floats(0.1, 100))
@settings(max_examples=100, deadline=None)
def test_a_trace_is_played_as_it_says(
    rows: list[dict[str, Any]], seed: int, speed: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("trace")
    events = load(folder, rows, seed=seed, speed=speed)
    assert events == load(folder, rows, seed=seed, speed=speed)
    assert len(events) == len(rows)
    assert [e.pause for e in events] == sorted(e.pause for e in events)
    assert events[0].pause == 0
    start = min(each["timestamp"] for each in rows)
    for event in events:
        told = rows[event.session - 1]
        assert sum(count for _, count in event.text) == told["input_length"]
        assert event.answer == max(1, told["output_length"])
        assert event.pause == pytest.approx((told["timestamp"] - start) / 1e3 / speed, abs=1e-6)


@given(rows=traces())
@settings(max_examples=100, deadline=None)
def test_equal_hash_ids_are_equal_bytes_and_no_others(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    events = load(tmp_path_factory.mktemp("trace"), rows)
    for one in events:
        for other in events:
            ids = [rows[event.session - 1]["hash_ids"] for event in (one, other)]
            lengths = [rows[event.session - 1]["input_length"] for event in (one, other)]
            whole = [each[: length // BLOCK] for each, length in zip(ids, lengths, strict=True)]
            differ = [n for n, pair in enumerate(zip(*whole, strict=False)) if pair[0] != pair[1]]
            shared = differ[0] if differ else min(map(len, whole))
            words = [text(event).split() for event in (one, other)]
            assert words[0][: shared * BLOCK] == words[1][: shared * BLOCK]
            if shared < min(map(len, whole)):
                assert words[0][shared * BLOCK :][:BLOCK] != words[1][shared * BLOCK :][:BLOCK]


def test_what_no_id_covers_is_shared_with_nobody(tmp_path: Path) -> None:
    one, other = load(tmp_path, [row(hash_ids=[1, 2]), row(hash_ids=[1, 3])])
    assert text(one)[-20:] != text(other)[-20:]


def test_another_seed_is_other_text_and_scale_shortens(tmp_path: Path) -> None:
    assert text(load(tmp_path, [row()])[0]) != text(load(tmp_path, [row()], seed=1)[0])
    half = load(tmp_path, [row()], scale=0.5)[0]
    assert len(text(half).split()) == 20
    assert half.answer == 4


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ([1], "not a JSON object"),
        (row(timestamp=-1), "timestamp"),
        (row(timestamp="now"), "timestamp"),
        (row(timestamp=True), "timestamp"),
        (row(timestamp=float("nan")), "timestamp"),
        (row(input_length=0), "input_length"),
        (row(input_length=2.5), "input_length"),
        (row(output_length=None), "output_length"),
        (row(hash_ids="1,2"), "hash_ids"),
        (row(hash_ids=[1, "2", 3]), "hash_ids"),
        (row(hash_ids=[1]), "1 hash_ids do not make 40 tokens in blocks of 16"),
        (row(hash_ids=[1, 2, 3, 4]), "4 hash_ids do not make 40"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, why: str) -> None:
    with pytest.raises(trace.TraceError, match=rf"trace\.jsonl:3: .*{why}"):
        load(tmp_path, [row(), row(), line])


def test_a_file_without_a_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(trace.TraceError, match="holds no request"):
        load(tmp_path, [])
    with pytest.raises(FileNotFoundError):
        trace.load(tmp_path / "none.jsonl")
