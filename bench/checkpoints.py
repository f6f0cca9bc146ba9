"""`python -m bench.checkpoints`: what keeping states costs a hybrid's prefill, in time, in this process.

The same prompt by turns, in chunks of the same longest length: straight through, and cut where states are
wanted, each of them kept. Medians, and their ratio; of processor time, which a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from bench.models import write_model_dir
from penstock.cache import store
from penstock.cache.checkpoints import positions
from penstock.engine import gated_delta
from penstock.engine.batch import Runner


def prefill(runner: Runner, ids: list[int], longest: int, cuts: Sequence[int]) -> float:
    """Seconds of processor time; the states at `cuts` are kept until it is done."""
    row = runner.open(len(ids) + 1)
    kept = []
    began = time.process_time()
    at = 0
    while at < len(ids):
        end = min(at + longest, next((cut for cut in cuts if cut > at), len(ids)), len(ids))
        mx.eval(runner.prefill(row, ids[at:end]))
        at = end
        if at in cuts:
            kept.append(store.snapshot(row, at, runner.states(row)))
    seconds = time.process_time() - began
    runner.close(row)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=__doc__)
    parser.add_argument("--length", type=int, default=6_000, help="ids of the prompt (%(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="ids of a chunk at most (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from mlx_lm.utils import load_model

    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        model, _ = load_model(write_model_dir(Path(scratch), "hybrid"))
    gated_delta.install()
    runner = Runner(model)
    ids = [300 + at % 600 for at in range(args.length)]
    length = args.length
    cuts = positions(length, [length // 5, length // 2, length - 900, length - 4], 0, None, 300)
    prefill(runner, ids[:512], args.chunk, [])
    found: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(args.rounds):
        found["without"].append(prefill(runner, ids, args.chunk, []))
        found["with"].append(prefill(runner, ids, args.chunk, cuts))
    without, kept = (statistics.median(found[name]) for name in ("without", "with"))
    ratios = [b / a for a, b in zip(found["without"], found["with"], strict=True)]
    print(f"{length} ids, chunks of {args.chunk}: {without:.2f} CPU s; with {len(cuts)} states {kept:.2f} s")
    print(f"pairs: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
