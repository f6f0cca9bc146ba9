"""Fuzz for a time: `python -m tests.fuzz --seconds 600 --seed 0 [--target requests]`.

Each target in turn, with the next seed, until the time is up. The first finding is printed with the smallest
input that shows it, and ends the run with code 1.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
import traceback
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.fuzz.targets import TARGETS

EXAMPLES = 300
"""Inputs of one target before the next target's turn."""


def fuzz(name: str, number: int, examples: int) -> None:
    """`examples` inputs of a target. Raises what a finding raises, for its smallest input."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def play(data: st.DataObject) -> None:
        TARGETS[name](data.draw)

    play()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    asked = parser.parse_args()
    logging.disable()
    end = time.monotonic() + asked.seconds
    played: Counter[str] = Counter()
    for number in itertools.count(asked.seed):
        for name in asked.target or TARGETS:
            if time.monotonic() > end:
                print(f"seeds {asked.seed} to {number}, inputs: {dict(played)}; nothing found", flush=True)
                return 0
            try:
                fuzz(name, number, EXAMPLES)
            except Exception:
                traceback.print_exc()
                print(f"\nfound by: python -m tests.fuzz --target {name} --seed {number}", file=sys.stderr)
                return 1
            played[name] += EXAMPLES
    return 0


if __name__ == "__main__":
    sys.exit(main())
