"""The real engine with a fault in its runner, named by PENSTOCK_TEST_FAULT. Production code has no hook.

`slow:SECONDS`: the first step of decoding takes so long; `abort:ID`: computing this id aborts the process;
`fence:SHARE`: --hard-memory-limit is at this share of where it should be, and the budget does not know.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.faults import Poisoned, aborts

from penstock.engine import limits, loop, main


class Slow:
    """Its first decode step is slow."""

    def __init__(self, runner: Any, seconds: float) -> None:
        self._runner = runner
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def decode(self, rows: Any, inputs: Any) -> Any:
        time.sleep(self._seconds)
        self._seconds = 0.0
        return self._runner.decode(rows, inputs)


def run_with_fault() -> int:
    kind, _, detail = os.environ["PENSTOCK_TEST_FAULT"].partition(":")
    made, fence = loop.Loop.__init__, limits.fence

    def init(self: loop.Loop, runner: Any, *rest: Any, **named: Any) -> None:
        faulty = Slow(runner, float(detail)) if kind == "slow" else Poisoned(runner, aborts, int(detail))
        made(self, faulty, *rest, **named)

    if kind == "fence":
        limits.fence = lambda ceiling: fence(int(ceiling * float(detail)))
    else:
        loop.Loop.__init__ = init  # type: ignore[method-assign]
    return main.main()


if __name__ == "__main__":
    sys.exit(run_with_fault())
