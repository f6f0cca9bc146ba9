"""How much memory a local server holds at most while traffic runs: its process and all below it.

What the system charges to each process (Linux: resident and swapped pages; macOS: the footprint, which has
Metal's buffers in it), added up ten times a second. Processes of other machines are not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from penstock.memory.probe import system_probe

INTERVAL = 0.1


async def peak_of(pid: int, over: asyncio.Event) -> int:
    """The most bytes that `pid` and its descendants held until `over` is set; 0 if none could be seen."""
    probe, peak = system_probe({}), 0
    while not over.is_set():
        peak = max(peak, sum(probe.read(each).footprint or 0 for each in (pid, *below(pid))))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), INTERVAL)
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
