"""The picture of a status: what it says, and that it fits its terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from penstock import status, wire
from penstock.cli.status_view import OWNERS, View
from penstock.memory.ledger import Account

GB = 10**9


def told(**fields: object) -> status.Status:
    """A server at work; `fields` replace what is said of it."""
    owners = {"weights": 5 * GB, "pool": GB, "live_kv": 4 * GB, "cached": 9 * GB, "transient": GB}
    memory = status.Memory(owners=owners, held=20 * GB, budget=32 * GB, budget_decided_by="memory pressure")
    memory.ceiling, memory.ceiling_decided_by = 36 * GB, "the device's limit"
    cache = status.Cache(bytes=9 * GB, tokens=280_000, nodes=61, checkpoints=37, queries=4000, hits=3000)
    cache.evicted = {"memory": 3 * GB, "budget": GB}
    values = {
        "model": "org/a-model-4B-8bit",
        "state": "ready",
        "reason": None,
        "stage": "",
        "time": 1_796_000_000.0,
        "uptime": 5100.0,
        "versions": {},
        "facts": None,
        "engine": None,
        "memory": memory,
        "running": 0,
        "queued": 0,
        "requests": [],
        "cache": cache,
        "counts": {},
        "cancels": {},
        "finished": {},
        "errors": {},
        "events": [],
        "given_back": {},
        "decided_by": "",
    }
    return status.Status(**(values | fields))  # type: ignore[arg-type]


def request(number: int, **fields: object) -> status.Request:
    values = {
        "id": f"{number:08x}{'0' * 16}",
        "path": "/v1/chat/completions",
        "stream": True,
        "stage": "decode",
        "seconds": 41.0,
        "prompt": 61_000,
        "cached": 12_288,
        "why": "diverged at token 12288",
        "prefilled": 60_999,
    }
    return status.Request(**(values | fields))  # type: ignore[arg-type]


PREFILL = request(1, stage="prefill", prefilled=30_500, eta=25.2, bytes=2 * GB)
DECODE = request(2, generated=312, tokens_per_second=38.44, bytes=63_000_000)
QUEUED = request(3, stage="queued", cached=0, why="", prefilled=0)
GAVE_WAY = request(4, stage="queued", preempted=True)
DEATH = status.Event(
    time=1_796_000_000.0,
    kind="engine_death",
    level="error",
    message="The engine died: killed by signal 9 (SIGKILL), by hand or by the kernel's out-of-memory killer.",
    advice="Open streams go on in a new engine. The log has its last words.",
    count=3,
)


def drawn(view: View, width: int = 80, height: int = 40) -> list[str]:
    """The lines as they come, without colours."""
    console = Console(width=width, height=height, file=io.StringIO(), highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return capture.get().splitlines()


def test_every_owner_of_memory_has_its_place() -> None:
    assert {name for name, *_ in OWNERS} == {account.value for account in Account}
    assert len({sign for *_, sign, _ in OWNERS}) == len(OWNERS), "told apart without colours"


def test_the_bar_shows_each_owner_by_its_share_of_the_budget() -> None:
    lines = drawn(View(told()), width=64)
    assert lines[0].split() == ["org/a-model-4B-8bit", "ready,", "up", "1", "h", "25", "min"]
    bar = {sign: lines[1].count(sign) for sign in "█▓▒▤░·"}
    assert bar == {"█": 10, "▓": 8, "▒": 18, "▤": 2, "░": 2, "·": 24}
    text = " ".join(lines)
    assert "20.0 GB of 32.0 GB (memory pressure), at most 36.0 GB" in text
    assert "▒ cached 9.0 GB" in text


def test_more_held_than_the_budget_fills_the_bar() -> None:
    state = told()
    state.memory.budget = 10 * GB
    bar = drawn(View(state))[1]
    assert len(bar) == 80
    assert "·" not in bar


def test_requests_are_told_with_progress() -> None:
    lines = drawn(View(told(running=2, queued=2, requests=[QUEUED, PREFILL, DECODE, GAVE_WAY])))
    at = lines.index("2 running, 2 queued")
    rows = [line.split() for line in lines[at + 2 : at + 6]]
    assert rows[0] == [
        "00000001",
        "━━━━━─────",
        "50%,",
        "25",
        "s",
        "61,000",
        "12,288",
        "2.0",
        "GB",
        "41",
        "s",
    ]
    assert rows[1] == "00000002 decode 61,000 12,288 312 38.4 63.0 MB 41 s".split()
    assert rows[2] == "00000003 queued 61,000 0 41 s".split()
    assert rows[3][:4] == ["00000004", "gave", "way,", "waits"]


def test_a_wide_terminal_tells_why_no_more_was_cached() -> None:
    state = told(running=1, requests=[DECODE])
    assert "diverged at token 12288" in "\n".join(drawn(View(state), 120))
    assert "diverged" not in "\n".join(drawn(View(state), 80))


def test_the_cache_and_the_events() -> None:
    text = " ".join(" ".join(drawn(View(told(events=[DEATH])))).split())
    assert (
        "cache 9.0 GB: 280,000 tokens in 61 nodes, 37 states; 75% of 4,000 prompt tokens were there" in text
    )
    assert "4.0 GB evicted" in text
    assert "out-of-memory killer. (3 times) Open streams go on in a new engine." in text


@pytest.mark.parametrize("state", ["loading", "restarting", "halted", "stalled", "downloading"])
def test_without_an_engine_there_is_a_picture_too(state: str) -> None:
    empty = told(state=state, reason="why it is so", memory=status.Memory(), cache=status.Cache())
    text = "\n".join(drawn(View(empty)))
    assert f"{state}, up" in text
    assert "why it is so" in text
    assert "no engine holds memory yet" in text


def test_a_load_tells_how_far_it_is() -> None:
    assert "weights" in "\n".join(drawn(View(told(state="loading", stage="weights"))))
    assert "calibration" not in "\n".join(drawn(View(told(stage="calibration")))), "that is over"


def test_silence_is_said() -> None:
    first = drawn(View(told(), silent=7.2))[0]
    assert "no answer for 7 s" in first
    assert "ready" not in first


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("height", [20, 24, 50])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_the_picture_fits_its_terminal_and_counts_who_does_not(width: int, height: int, count: int) -> None:
    requests = [*(request(n, bytes=GB) for n in range(count)), QUEUED]
    state = told(running=count, queued=1, requests=requests, events=[DEATH])
    lines = drawn(View(state), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    shown = sum(line.startswith("0000") for line in lines)
    left = next((int(line.split()[1]) for line in lines if line.startswith("and ")), 0)
    assert shown + left == len(requests)
    assert len([n for n in drawn(View(state, whole=True), width, height) if n.startswith("0000")]) == len(
        requests
    )


def test_a_name_with_brackets_is_no_markup() -> None:
    assert "[red]x[/red]" in drawn(View(told(model="[red]x[/red]")))[0]


def test_nodes_need_no_place_in_it() -> None:
    state = told()
    state.cache.tree = [wire.Prefix(0, None, 0, 5, 5, 0, 0, 0, False)]
    assert drawn(View(state)) == drawn(View(told()))
