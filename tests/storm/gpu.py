"""`python -m tests.storm.gpu OUT_DIR`: storms over large models, for a machine with a GPU.

Layers of real models by their shapes, 8-bit random weights and bfloat16 keys and values, contexts to 60,000.
For each model two storms: one as in service (steps launched ahead where the load probe finds that this copies
nothing, else not), and one step by step, where each peak belongs to one step and is compared with its
prediction. Prints a table a storm and writes OUT_DIR/storm-MODEL-MODE.json, also when the time is up before
the steps are computed. `--scale toy` takes the small shapes, to try the program where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from tests.storm.harness import Storm, measured
from tests.storm.subjects import LARGE, Subject, large, toy

from penstock.engine import device, probe, seams
from penstock.memory.predict import Transient

ROOM = 48 << 30
"""Bytes that the probe and calibration may use on a GPU."""


def calibrated(subject: Subject, longest: int, times: int, pipelined: bool) -> Transient:
    """The predictor; what compiles kernels may be slow the first time."""
    for _ in range(times):
        began = time.monotonic()
        transient = measured(subject, longest, pipelined)
        print(f"calibrated in {time.monotonic() - began:.1f} s: {transient}", flush=True)
    return transient


def storm(subject: Subject, transient: Transient, args: argparse.Namespace, pipelined: bool) -> Storm:
    return Storm(
        subject,
        seed=args.seed,
        share=args.share,
        pipelined=pipelined,
        cache=args.cache == "on",
        transient=transient,
        longest=args.chunk,
    )


def play(storm: Storm, args: argparse.Namespace, facts: dict[str, Any]) -> bool:
    """One storm to its end or its time; whether the bound held."""
    error = ""
    try:
        storm.run(args.steps, seconds=args.seconds)
    except (AssertionError, RuntimeError) as problem:
        error = str(problem)[:2000]
    record = storm.record
    name = f"storm-{facts['model']}-{facts['mode']}"
    print(f"\n{name}: weights {storm.weights / 1e9:.2f} GB, longest alone {storm.alone / 1e9:.2f} GB, "
          f"budget {storm.ceiling / 1e9:.2f} GB")  # fmt: skip
    print("  " + "\n  ".join(record.lines()), flush=True)
    lacks = record.lacks(args.steps, args.context * 49 // 50)
    print(f"  shows nothing yet, it lacks: {'; '.join(lacks)}" if lacks else "  tight", flush=True)
    if error:
        print(f"  FAILED: {error}", flush=True)
    fields = {
        **facts,
        "weights_bytes": storm.weights,
        "longest_alone_bytes": storm.alone,
        "ceiling_bytes": storm.ceiling,
        "transient": asdict(storm.transient),
        "lacks": lacks,
        "error": error,
        **record.fields(),
    }
    Path(args.out, name + ".json").write_text(json.dumps(fields, indent=1))
    return not error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.storm.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="directory for the figures")
    parser.add_argument("--models", default=",".join(LARGE), help="of %(default)s")
    parser.add_argument("--modes", default="service,stepwise", help="of %(default)s")
    parser.add_argument("--scale", choices=("large", "toy"), default="large")
    parser.add_argument("--layers", type=int, help="instead of each model's own number here")
    parser.add_argument("--context", type=int, default=60_000)
    parser.add_argument("--chunk", type=int, help="the longest chunk, instead of each model's own here")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=240, help="a storm at most (%(default)s)")
    parser.add_argument("--share", type=float, default=1.15, help="of the longest alone (%(default)s)")
    parser.add_argument("--cache", choices=("on", "off"), default="on", help="the prompt cache (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibrate", type=int, default=1, help="how many times (%(default)s)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    seams.install()
    longest, good = args.chunk, True
    for name in args.models.split(","):
        began = time.monotonic()
        subject = (
            toy(name, args.context) if args.scale == "toy" else large(name, args.layers, args.context, ROOM)
        )
        print(f"\n== {subject.words} on {device.backend()}, {device.name()}, "
              f"drawn in {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
        args.chunk = longest or LARGE[name][2]
        ahead = not probe.copies(subject.runner._model, subject.runner.mode, ROOM)
        print(f"steps are launched ahead: {ahead}", flush=True)
        facts = {"model": name, "words": subject.words, "launched_ahead": ahead, "seed": args.seed}
        facts |= {"device": device.name(), "context": args.context, "longest_chunk": args.chunk}
        for mode in args.modes.split(","):
            pipelined = ahead and mode == "service"
            transient = calibrated(subject, args.chunk, args.calibrate, pipelined)
            good &= play(storm(subject, transient, args, pipelined), args, facts | {"mode": mode})
        del subject
        gc.collect()
        mx.clear_cache()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
