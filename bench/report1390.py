"""`python -m bench.report1390`: the report's traffic against both servers under one hard limit.

Both servers are started as the reporter did: a model, no memory option. The limit comes from outside. On CPUs
it is RLIMIT_DATA, which holds for every process of the tree: who passes it gets no memory from the system, in
MLX a segmentation fault. On a CUDA device (--gpu) another process holds the rest of the device's memory.
Prints requests, losses, peak and wall time of each, what its prompt cache holds at the end, and how its
process ended. With --cache-bytes both get that cap, and the share of ids that were cached is what counts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import procs
from penstock.traffic import watch
from penstock.traffic.client import Player
from penstock.traffic.profiles import Event, issue1390
from penstock.traffic.report import markdown, rows, summary

MORE = ("stored_mb", "unfinished", "books", "engine_deaths", "counts")
SYSTEMS = ("mlx_lm.server", "penstock")


def patient(events: list[Event]) -> list[Event]:
    """The same without anyone hanging up: every request counts."""
    return [replace(event, leave_in_prefill=None, leave_after=None, back_after=None) for event in events]


@contextmanager
def device_limit(gigabytes: float) -> Iterator[str]:
    """Leaves that much of the CUDA device to others; yields what the driver says is left."""
    command = [sys.executable, "-m", "bench.ballast", str(gigabytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        if not (said := holder.stdout.readline().strip()):
            raise RuntimeError("the device's memory could not be taken")
        yield said
        holder.stdin.close()


@dataclass
class Books:
    """What penstock says of itself while it is measured: the most it held, against the budget then."""

    port: int
    over: threading.Event = field(default_factory=threading.Event)
    held: int = 0
    share: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)

    def watch(self) -> None:
        """Look about twice a second until `over`."""
        while not self.over.wait(0.5):
            with suppress(OSError, ValueError):
                self.look()

    def look(self) -> None:
        """One look."""
        url = f"http://127.0.0.1:{self.port}/health"
        with urllib.request.urlopen(url, timeout=10) as answer:
            self.last = json.load(answer)
        if memory := self.last.get("memory"):
            held = memory["active"] + memory["pooled"]
            self.held = max(self.held, held)
            self.share = max(self.share, held / memory["budget"])


@dataclass
class Run:
    """How one system is measured."""

    events: list[Event]
    rlimit: int | None
    gpu: bool
    seconds: float
    """After that what has not been answered is left; its requests count as unfinished."""
    options: tuple[str, ...] = ()
    """Of both servers, beside their defaults."""

    def measure(self, system: str, model: Path, log: Path) -> dict[str, Any]:
        """One run of one system: its figures, and how it was at the end."""
        limits: dict[str, Any] = {"gpu": self.gpu, "data_limit": self.rlimit, "options": self.options}
        with procs.Server(system, model, log, **limits) as server:
            server.wait_ready(600.0)
            books = Books(server.port)
            if system == "penstock":
                threading.Thread(target=books.watch, daemon=True).start()
            player = Player(f"http://127.0.0.1:{server.port}/v1", "default_model")
            player.fit_words()
            playing = threading.Thread(target=player.play, args=(self.events,), daemon=True)
            began = time.monotonic()
            playing.start()
            playing.join(self.seconds)
            seconds = time.monotonic() - began
            done = {(r.session, r.turn) for r in player.records}
            code = server.process.poll()
            books.over.set()
            peak = max(s.device if self.gpu else s.resident for s in server.samples)
            found = summary([watch.Run(list(player.records), seconds, [(0.0, peak)])])
            found["unfinished"] = len({(e.session, e.turn) for e in self.events} - done)
            found["end"] = "alive" if code is None else f"ended with {code}"
            if code is None:
                found["stored_mb"] = stored(system, server)
            if system == "penstock" and code is None:
                found["books"] = {"held_at_most": books.held, "share_of_budget_at_most": books.share}
                found["engine_deaths"] = books.last.get("engine_deaths")
                found["counts"] = (books.last.get("memory") or {}).get("counts")
            return found


def stored(system: str, server: procs.Server) -> float:
    """MB in the server's prompt cache, by its own words: the last in the log, or /v1/status."""
    time.sleep(1.5)  # until it has said it
    if system == "penstock":
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/status", timeout=10) as answer:
            return float(json.load(answer)["cache"]["bytes"]) / 1e6
    said = re.findall(r"Prompt Cache: .*?([\d.]+) GB", server.log.read_text())
    return float(said[-1]) * 1e3 if said else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report1390", description=__doc__)
    parser.add_argument("--limit", type=float, default=1.7, help="RLIMIT_DATA in GB; 0: none (%(default)s)")
    parser.add_argument("--cache-bytes", help="--prompt-cache-bytes of both")
    parser.add_argument("--scale", type=float, default=0.042, help="of the profile's lengths (%(default)s)")
    parser.add_argument("--sessions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-up", action="store_true", help="clients leave and come back, as reported")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=SYSTEMS)
    parser.add_argument("--out", type=Path, help="JSON; the servers' logs beside it")
    parser.add_argument("--turns", type=int, help="of each session at most")
    parser.add_argument("--gpu", type=float, metavar="GB", help="on a CUDA device with that much left free")
    parser.add_argument("--shape", default="report", help="of the model (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="of its weights (%(default)s)")
    parser.add_argument("--model-dir", type=Path, help="where the model is, or will be")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for each system (%(default)s)")
    args = parser.parse_args()
    events = issue1390(args.seed, args.scale, args.sessions)
    events = events if args.hang_up else patient(events)
    events = [event for event in events if args.turns is None or event.turn < args.turns]
    rlimit = None if args.gpu else int(args.limit * 1e9) or None
    cap = ("--prompt-cache-bytes", args.cache_bytes) if args.cache_bytes else ()
    run = Run(events, rlimit, args.gpu is not None, args.seconds, cap)
    found: dict[str, Any] = {"limit_gb": args.gpu or args.limit, "scale": args.scale}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        model = args.model_dir or Path(scratch) / "model"
        writer = [sys.executable, "-m", "bench.models", args.shape, str(model), "--dtype", args.dtype]
        subprocess.run(writer, check=True, env=procs.environment(gpu=run.gpu))
        for system in args.systems:
            name = f"{system}.log"
            log = args.out.with_name(f"{args.out.stem}-{name}") if args.out else Path(scratch) / name
            with device_limit(args.gpu) if run.gpu else nullcontext("") as left:
                if left:
                    print(left, flush=True)
                figures = run.measure(system, model, log)
            found[system] = figures
            more = {name: figures[name] for name in figures if name in MORE}
            print(
                f"{system}: {figures['end']}\n{markdown(rows({system: figures}))}\n{json.dumps(more)}\n",
                flush=True,
            )
            if args.out:
                args.out.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
