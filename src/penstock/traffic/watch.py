"""A run of traffic against one server, and how much memory that holds at most if it runs here.

Its process and all below it: what the system charges to each (Linux: resident and swapped pages; macOS: the
footprint, which has Metal's buffers in it), added up ten times a second. Servers elsewhere are not watched.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Event as Flag
from typing import Any
from urllib.parse import urlsplit

from penstock import platform
from penstock.memory.probe import system_probe
from penstock.traffic.client import Player
from penstock.traffic.profiles import Event
from penstock.traffic.report import summary

INTERVAL = 0.1


def run_watched(
    url: str, model: str, key: str | None, events: Sequence[Event]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Play `events` against the server at `url`: the run's figures, and its records."""
    address, over = urlsplit(url), Flag()
    local = address.hostname in ("127.0.0.1", "localhost", "::1") and address.port is not None
    holder = platform.port_holder(address.port or 0) if local else None
    player = Player(url, model, key)
    player.fit_words()
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(peak_of, holder.pid, over) if holder else None
        began = time.monotonic()
        try:
            records = player.play(events)
        finally:
            over.set()
        seconds = time.monotonic() - began
    peak = watching.result() if watching else 0
    shown = [{**asdict(record), "text": len(record.text)} for record in records]
    return summary(records, seconds, peak or None), shown


def peak_of(pid: int, over: Flag) -> int:
    """The most bytes that `pid` and its descendants held until `over` is set; 0 if none could be seen."""
    probe, peak = system_probe({}), 0
    while True:
        peak = max(peak, sum(probe.read(each).footprint or 0 for each in (pid, *below(pid))))
        if over.wait(INTERVAL):
            return peak


def below(pid: int) -> Iterator[int]:
    """All processes that descend from `pid`."""
    children: list[str] = []
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                children += (task / "children").read_text().split()
    else:
        listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
        children = listed.stdout.split()
    for child in map(int, children):
        yield child
        yield from below(child)
