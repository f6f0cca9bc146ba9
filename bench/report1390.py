"""`python -m bench.report1390`: the report's traffic against both servers under one hard limit.

Both servers are started as the reporter did: a model, no memory option. RLIMIT_DATA, set from outside,
holds for every process of the tree: who passes it gets no memory from the system, which in MLX's CPU back end
is a segmentation fault. Prints requests, losses, peak and wall time of each, and how its process ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import procs
from penstock.traffic.client import Player
from penstock.traffic.profiles import Event, issue1390
from penstock.traffic.report import summary, table

SYSTEMS = ("mlx_lm.server", "penstock")


def patient(events: list[Event]) -> list[Event]:
    """The same without anyone hanging up: every request counts."""
    return [Event(e.session, e.turn, e.pause, e.shared, e.block, e.new, e.answer) for e in events]


def measure(
    system: str, model: Path, events: list[Event], limit: int, log: Path
) -> tuple[dict[str, Any], str]:
    """One run of one system: its figures, and how it was at the end."""
    with procs.Server(system, model, log, data_limit=limit) as server:
        server.wait_ready()
        player = Player(f"http://127.0.0.1:{server.port}/v1", "default_model")
        began = time.monotonic()
        records = player.play(events)
        seconds = time.monotonic() - began
        code = server.process.poll()
        end = "alive" if code is None else f"ended with {code}"
        if system == "penstock" and code is None:
            end += f", {health(server.port)['engine_deaths']} engine deaths"
        return summary(records, seconds, max(s.resident for s in server.samples)), end


def health(port: int) -> dict[str, Any]:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        return dict(json.load(answer))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report1390", description=__doc__)
    parser.add_argument("--limit", type=float, default=1.7, help="RLIMIT_DATA in GB (%(default)s)")
    parser.add_argument("--scale", type=float, default=0.042, help="of the profile's lengths (%(default)s)")
    parser.add_argument("--sessions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-up", action="store_true", help="clients leave and come back, as reported")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=SYSTEMS)
    parser.add_argument("--out", type=Path, help="JSON; the servers' logs beside it")
    args = parser.parse_args()
    events = issue1390(args.seed, args.scale, args.sessions)
    events = events if args.hang_up else patient(events)
    found = {}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        model = Path(scratch) / "report"
        writer = [sys.executable, "-m", "bench.models", "report", str(model)]
        subprocess.run(writer, check=True, env=procs.environment(gpu=False))
        for system in args.systems:
            name = f"{system}.log"
            log = args.out.with_name(f"{args.out.stem}-{name}") if args.out else Path(scratch) / name
            figures, end = measure(system, model, events, int(args.limit * 1e9), log)
            found[system] = {**figures, "end": end}
            print(f"{system}: {end}\n{table(figures)}\n", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"limit_gb": args.limit, "scale": args.scale, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
