"""A run of traffic against one server, and how much memory that holds all the while if it runs here.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event as Flag
from typing import Any
from urllib.parse import urlsplit

from penstock import platform
from penstock.memory.probe import system_probe
from penstock.traffic.client import Player, Record
from penstock.traffic.profiles import Event

INTERVAL = 0.1


@dataclass(frozen=True)
class Run:
    """What came of one round against one server."""

    records: list[Record]
    seconds: float
    held: list[tuple[float, int]]
    """Seconds from the start, and the bytes of the server's processes then; empty if they were not seen."""

    def told(self) -> dict[str, Any]:
        """For a file: of each text only the length."""
        records = [{**asdict(record), "text": len(record.text)} for record in self.records]
        return {"seconds": self.seconds, "held": self.held, "records": records}


def run_watched(player: Player, events: Sequence[Event], pid: int | None) -> Run:
    """Play `events`, and watch the process tree of `pid` meanwhile."""
    over = Flag()
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        watching = pool.submit(held_by, pid, over) if pid is not None else None
        try:
            player.play(events)
        finally:
            over.set()
        seconds = time.monotonic() - began
    return Run(player.records, seconds, watching.result() if watching else [])


def local_pid(url: str) -> int | None:
    """The process that listens where `url` points, if that is this machine and the system tells."""
    address = urlsplit(url)
    local = address.hostname in ("127.0.0.1", "localhost", "::1")
    holder = platform.port_holder(address.port or 80) if local else None
    return holder.pid if holder else None


def held_by(pid: int, over: Flag) -> list[tuple[float, int]]:
    """Bytes of `pid` and its descendants over time, until `over` is set; nothing where none could be seen."""
    probe, began, found = system_probe({}), time.monotonic(), []
    while True:
        held = sum(probe.read(each).footprint or 0 for each in (pid, *below(pid)))
        if held:
            found.append((time.monotonic() - began, held))
        if over.wait(INTERVAL):
            return found


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
