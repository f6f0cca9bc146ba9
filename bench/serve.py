"""`make bench`: penstock beside mlx_lm.server and the raw loops: one run, same models, same traffic, in turn.

Each round starts every system afresh (so nobody's earlier answers count as memory or as cache), warms it up,
sends the batch from a process of its own, and reads time stamps per id. Rounds alternate the systems' order.
Prints a table of medians with min–max and of ratios taken round by round, and writes everything as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from bench import procs, report
from bench.models import SHAPES, prompt_text

BASE = "mlx_lm.server"
SYSTEMS = [BASE, "penstock", "raw mlx_lm", "raw penstock"]
MB = 1e6
BRIEF = ("ttft_max_ms", "step_ms", "tokens_per_s")
Results = dict[str, dict[str, list[report.Figures]]]


@dataclass(frozen=True)
class Case:
    """A batch: prompt and answer ids of each row. Rows of another length than row 0 come once that answers,
    or with `at_once` together with it. Raw loops are measured in the first `raw_rounds` rounds only."""

    name: str
    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    rounds: int
    raw_rounds: int = 0
    at_once: bool = False


def equal(rows: int, length: int, answer: int, rounds: int) -> Case:
    """Rows of one length."""
    return Case(f"{rows} × {length}", (length,) * rows, (answer,) * rows, rounds, rounds)


def skewed(
    long: int, rows: int, short: int, answer: int, *, rounds: int, raw: int = 0, at_once: bool = False
) -> Case:
    """One long row beside short ones; at once, these answer longer, so that all decode together a while."""
    name = f"{long:,} + {rows} × {short}" + (", at once" if at_once else "")
    short_answer = 2 * answer if at_once else answer
    return Case(name, (long, *(short,) * rows), (answer, *(short_answer,) * rows), rounds, raw, at_once)


SUITES: dict[str, list[Case]] = {
    "smoke": [equal(4, 64, 32, 1), skewed(1000, 3, 50, 40, rounds=1, raw=1)],
    "full": [equal(8, 512, 96, 3), skewed(8000, 7, 100, 32, rounds=2, raw=1)],
    "queue": [skewed(4000, 7, 100, 32, rounds=2, at_once=True)],
    "gpu": [
        equal(8, 512, 256, 2),
        skewed(8000, 7, 100, 192, rounds=2, raw=1),
        equal(1, 512, 256, 1),
        skewed(8000, 7, 100, 128, rounds=1, at_once=True),
        equal(32, 512, 128, 1),
    ],
}


def requests(case: Case, seed: int) -> list[dict[str, Any]]:
    """The chat requests of a case. A word is an id, so lengths are exact but for the template's few."""
    return [
        {
            "path": "/v1/chat/completions",
            "late": length != case.prompts[0] and not case.at_once,
            "body": {
                "model": "default_model",
                "messages": [{"role": "user", "content": prompt_text(length, seed * 1000 + row)}],
                "max_tokens": answer,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        }
        for row, (length, answer) in enumerate(zip(case.prompts, case.answers, strict=True))
    ]


def measure(system: str, model: Path, case: Case, seed: int, *, log: Path, gpu: bool) -> report.Figures:
    """One round of one system. Raises RuntimeError if any answer is not whole."""
    if system.startswith("raw "):
        return measure_raw(system.removeprefix("raw "), model, case, seed, gpu=gpu)
    with procs.Server(system, model, log, gpu=gpu) as server:
        server.wait_ready()
        warm = equal(len(case.prompts), 48, 6, 1)
        check(warm, procs.send_load(server.port, requests(warm, seed + 500)), system)
        time.sleep(0.5)
        idle = procs.resident(server.pids())
        device_idle = server.samples[-1].device
        server.reset_peak()
        answers = procs.send_load(server.port, requests(case, seed))
        peak = server.peak()
        check(case, answers, system)
        rows = [answer["arrivals"] for answer in answers]
        figures = report.timings([answer["sent"] for answer in answers], rows)
        figures |= {"idle_mb": idle / MB, "peak_mb": peak / MB, "peak_over_idle_mb": (peak - idle) / MB}
        start, end = report.steady_window(rows)
        steady = [s for s in server.samples if start <= s.at <= end]
        if len(steady) > 1:
            figures["decode_over_idle_mb"] = (median(s.resident for s in steady) - idle) / MB
            spent, between = steady[-1].front_cpu - steady[0].front_cpu, (steady[0].at, steady[-1].at)
            emitted = sum(between[0] < t <= between[1] for row in rows for t in row)
            if system == "penstock" and emitted and procs.LINUX:
                figures["front_us_per_token"] = 1e6 * spent / emitted
        if gpu:
            top = max(s.device for s in server.samples)
            figures["device_over_idle_mb"] = (top - device_idle) / MB
        return figures


def check(case: Case, answers: list[dict[str, Any]], system: str) -> None:
    """Every row answered in full, or the figures mean nothing."""
    for row, (answer, wanted) in enumerate(zip(answers, case.answers, strict=True)):
        got, usage = len(answer["arrivals"]), answer["usage"] or {}
        if not answer["complete"] or got != wanted or usage.get("completion_tokens") != wanted:
            raise RuntimeError(
                f"{system}, {case.name}, row {row}: {got} of {wanted} ids, usage {usage}, "
                f"status {answer['status']}, error {answer['error']}"
            )


def measure_raw(loop: str, model: Path, case: Case, seed: int, *, gpu: bool) -> report.Figures:
    """One round of a raw loop, on the same prompts without the template."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = [prompt_text(length, seed * 1000 + row) for row, length in enumerate(case.prompts)]
    spec = {
        "loop": loop,
        "model": str(model),
        "prompts": [encoded.ids for encoded in tokenizer.encode_batch(texts)],
        "max_tokens": case.answers,
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.raw"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=False,
        env=procs.environment(gpu=gpu),
    )
    if done.returncode:
        raise RuntimeError(f"raw {loop}: {done.stderr[-1500:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    figures = report.timings([answer["sent"]] * len(case.prompts), answer["arrivals"])
    start, end = report.steady_window(answer["arrivals"])
    held = [size for at, size in answer["held"] if start <= at <= end]
    if held:
        figures["kv_mb"] = min(held) / MB
    return figures | {"allocator_peak_mb": answer["peak"] / MB}


def run(args: argparse.Namespace, models: dict[str, Path], log: Path) -> Iterator[Results]:
    """All rounds; the results so far after each. A system that fails is left out of that round, and told."""
    results: Results = {}
    began = time.monotonic()
    for (shape, model), case in itertools.product(models.items(), SUITES[args.suite]):
        measured = [s for s in args.systems if case.raw_rounds or not s.startswith("raw ")]
        found = results[f"{shape}, {case.name}"] = {system: [] for system in measured}
        for turn in range(args.rounds or case.rounds):
            for system in measured if turn % 2 == 0 else measured[::-1]:
                started = time.monotonic()
                if system.startswith("raw ") and turn >= case.raw_rounds:
                    continue
                label = f"{shape}, {case.name}, round {turn + 1}, {system}"
                if args.deadline and started - began > args.deadline:
                    print(f"{label}: left out, {args.deadline:.0f} s are over", file=sys.stderr)
                    continue
                try:
                    figures = measure(system, model, case, turn + 1, log=log, gpu=args.gpu)
                except (RuntimeError, subprocess.SubprocessError) as problem:
                    print(f"{label}: FAILED: {problem}\n{_tail(log)}", file=sys.stderr)
                    continue
                found[system].append(figures)
                brief = {key: round(figures[key], 1) for key in BRIEF if key in figures}
                print(f"{label}: {time.monotonic() - started:.0f} s {brief}", file=sys.stderr)
                yield results


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:] if log.exists() else ""


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    import os

    packages = ("mlx", "mlx-lm", "penstock", "uvicorn", "tokenizers")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "from source"
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "blas": procs.environment(gpu=False).get("LD_PRELOAD", "").rsplit("/", 1)[-1],
        "versions": versions,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="full")
    parser.add_argument("--smoke", action="store_const", const="smoke", dest="suite", help="under a minute")
    parser.add_argument("--rounds", type=int, help="instead of the suite's own number")
    parser.add_argument("--models", type=lambda text: text.split(","), help="shapes of bench.models")
    parser.add_argument("--model-dir", type=Path, help="measure this model directory instead")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=SYSTEMS)
    parser.add_argument("--gpu", action="store_true", help="no OpenBLAS; GPU memory through nvidia-smi")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--deadline", type=float, default=780, help="start no round after so many seconds")
    parser.add_argument("--out", type=Path, help="JSON of all rounds; the servers' log beside it")
    args = parser.parse_args()
    args.models = args.models or (["dense"] if args.suite == "smoke" else ["dense", "hybrid"])
    if unknown := set(args.models) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}")
    return args


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = machine()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        models = {args.model_dir.name: args.model_dir} if args.model_dir else {}
        for shape in [] if args.model_dir else args.models:
            models[shape] = Path(scratch) / shape
            writer = [sys.executable, "-m", "bench.models", shape, str(models[shape]), "--dtype", args.dtype]
            subprocess.run(writer, check=True, env=procs.environment(gpu=args.gpu))
        results: Results = {}
        cases = {case.name: asdict(case) for case in SUITES[args.suite]}
        log = args.out.with_suffix(".log") if args.out else Path(scratch) / "servers.log"
        for results in run(args, models, log):
            if args.out:
                found = {"machine": about, "cases": cases, "results": results}
                args.out.write_text(json.dumps(found, indent=1))
    print(report.table(results, BASE))
    return 0 if all(rounds for systems in results.values() for rounds in systems.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
