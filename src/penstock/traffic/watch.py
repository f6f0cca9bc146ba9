"""How much memory a local server holds at most while traffic runs: its process and all below it.

What the system charges to each process (Linux: resident and swapped pages; macOS: the footprint, which has
Metal's buffers in it), added up ten times a second. Processes of other machines are not known here.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from penstock.memory.probe import system_probe

INTERVAL = 0.1


class Watch:
    """`with Watch(pid) as watch: …` and then `watch.peak` in bytes; None where nothing was to be seen."""

    def __init__(self, pid: int | None) -> None:
        self.peak: int | None = None
        self._pid = pid
        self._probe = system_probe({})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        if self._pid is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._pid is not None:
            self._thread.join()

    def _look(self) -> None:
        assert self._pid is not None
        while True:
            found = [self._probe.read(pid).footprint for pid in (self._pid, *below(self._pid))]
            held = sum(size for size in found if size)
            if held:
                self.peak = max(self.peak or 0, held)
            if self._stop.wait(INTERVAL):
                return


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
