"""`python -m bench.short_behind_long`: short requests that come while a very long prompt is computed, timed.

The long prompt alone, the short ones alone, then both: the short ones come one after the other for as long as
the long prompt has no answer. Printed: each short one's time to its first token less its own alone, in stall
targets (`--stall-target-ms`, 200 by default), and the long prompt's time to its first token, less all that
the short ones took by themselves, by its time alone. Promised are at most three stall targets and 1.25 times.

A chunk has at least 256 ids, so the figures speak of the scheduler only where those take well less than the
stall target, also behind the long prompt: what they took on average is printed too (`floor_chunk_s`).
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench import procs
from bench.models import prompt_text
from penstock.memory.costs import CHUNK_FLOOR

STALL_TARGET = 0.2
"""Seconds: the server's default."""


@dataclass(frozen=True)
class Timed:
    """Seconds from the request to its first text, and to its end."""

    first: float
    whole: float


def ask(port: int, words: int, seed: int, tokens: int) -> Timed:
    """One streamed request for a prompt that no other seed shares a beginning with."""
    fields = {"max_tokens": tokens, "temperature": 0, "stream": True}
    body = json.dumps({**fields, "messages": [{"role": "user", "content": prompt_text(words, seed)}]})
    began, first = time.monotonic(), 0.0
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=3600)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.monotonic() - began
            if line.startswith(b"data: [DONE]"):
                return Timed(first, time.monotonic() - began)
    raise RuntimeError("the answer ended early")


def measure(port: int, long: int, short: int, tokens: int) -> dict[str, float]:
    """All three parts, with prompts of `long` and `short` words and short answers of `tokens`."""
    ask(port, short, 0, tokens)  # the first of a shape is slower
    ask(port, long // 8, 1, 2)
    alone = ask(port, long, 2, 2)
    shorts_alone = [ask(port, short, 10 + at, tokens) for at in range(5)]
    own = statistics.median(timed.first for timed in shorts_alone)
    each = statistics.median(timed.whole for timed in shorts_alone)
    beside: list[Timed] = []
    client = threading.Thread(target=lambda: beside.append(ask(port, long, 3, 2)))
    client.start()
    time.sleep(min(1.0, alone.first / 5))
    shorts: list[Timed] = []
    while client.is_alive():
        shorts.append(ask(port, short, 100 + len(shorts), tokens))
        time.sleep(min(0.5, alone.first / 10))
    client.join()
    shorts = shorts[:-1] or shorts  # the last one may have had the server to itself
    late = sorted((timed.first - own) / STALL_TARGET for timed in shorts)
    return {
        "long_alone_s": alone.first,
        "long_beside_s": beside[0].first,
        "short_alone_first_s": own,
        "short_alone_whole_s": each,
        "floor_chunk_s": alone.first * CHUNK_FLOOR / long,
        "shorts": len(shorts),
        "short_late_in_stall_targets_median": statistics.median(late),
        "short_late_in_stall_targets_worst": late[-1],
        "long_less_the_shorts_by_alone": (beside[0].first - len(shorts) * each) / alone.first,
    }


def spread(rounds: list[dict[str, float]]) -> str:
    """Median and range of every figure over the rounds."""
    lines = []
    for name in rounds[0]:
        values = sorted(figures[name] for figures in rounds)
        lines.append(f"{name:36s} {statistics.median(values):8.3f}  ({values[0]:.3f} to {values[-1]:.3f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.short_behind_long", description=__doc__)
    parser.add_argument("--shape", default="small", help="of bench.models (%(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--long", type=int, default=16_000, help="words of the long prompt (%(default)s)")
    parser.add_argument("--short", type=int, default=200, help="words of the short ones (%(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="of a short answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="MLX's CUDA back end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        model = Path(scratch) / "model"
        writer = [sys.executable, "-m", "bench.models", args.shape, str(model), "--dtype", args.dtype]
        subprocess.run(writer, check=True, env=procs.environment(gpu=args.gpu))
        rounds = []
        for _ in range(args.rounds):
            with procs.Server("penstock", model, Path(scratch) / "log", gpu=args.gpu) as server:
                server.wait_ready()
                rounds.append(measure(server.port, args.long, args.short, args.tokens))
                print(json.dumps(rounds[-1]), flush=True)
        print(spread(rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
