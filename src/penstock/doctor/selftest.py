"""The memory storm on the user's machine: a server of its own under a small budget, and traffic that hurts.

Many lengths, clients that hang up, and more to remember than the budget holds. What it tells can be pasted in
public: versions, the machine, figures; no names, no paths, no prompts. None of the user's settings is used,
and nothing is left behind.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag
from typing import Any

from penstock import platform
from penstock.config import PREFIX
from penstock.sizes import gigabytes
from penstock.traffic.client import Player, ServerProblem, get
from penstock.traffic.profiles import Event
from penstock.traffic.report import Figures, listed, summary
from penstock.traffic.watch import run_watched

PATIENCE = 600.0
"""Seconds that loading and measuring a model, and any answer, may take."""
MARGIN = 512
"""Tokens for the template, and for a tokenizer that makes more of the words than was asked for."""
PROGRAM = "import sys; from penstock.cli import main; sys.exit(main())"


class SelfTestProblem(Exception):
    """The storm could not begin. One sentence."""


@dataclass
class Seen:
    """What the server said of itself during the storm. `held`: by MLX at most, its pool included."""

    held: int = 0
    ceiling: int = 0
    deaths: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    exit_code: int | None = None


def budget(
    figures: Callable[[int], Mapping[str, Any]], plan: Mapping[str, Any], events: Sequence[Event]
) -> int:
    """About the least in which the longest conversation fits; all of them together do not.

    `figures`: those of the model under a limit; `plan`: without one. Raises SelfTestProblem.
    """
    lengths: Counter[int] = Counter()
    for event in events:
        lengths[event.session] += event.answer + sum(count for _, count in event.text)
    longest = sum(count for _, count in events[0].system) + max(lengths.values()) + MARGIN
    a_token = plan["kv_bytes_per_token"] + plan["step_bytes_at_longest"] / plan["longest"]
    size = int(1.05 * plan["weights_bytes"] + longest * a_token)
    while not (found := figures(size))["fits"] or found["longest"] < longest:
        if size > plan["ceiling_bytes"] or longest > plan["context_length"]:
            raise SelfTestProblem(f"its {longest:,} tokens of context do not fit: make it smaller by --scale")
        size = int(size * 1.2)
    return size


def run(model: Path, limit: int, events: Sequence[Event]) -> tuple[Figures, Seen]:
    """The storm's figures, and what the server said. Raises SelfTestProblem if it does not come up."""
    seen, over = Seen(), Flag()
    with _server(model, limit) as (process, url), ThreadPoolExecutor(1) as pool:
        watching = pool.submit(_watch, url, seen, over)
        player = Player(url + "/v1", "self-test", timeout=PATIENCE)
        try:
            player.fit_words()
            done = run_watched(player, events, process.pid)
            time.sleep(1.0)  # the books are told twice a second
        finally:
            over.set()
        watching.result()
        process.terminate()
        seen.exit_code = process.wait(PATIENCE)
    return summary([done]), seen


@contextmanager
def _server(model: Path, limit: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A penstock on a free port, once it is ready; it is gone in the end."""
    with platform.listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    with tempfile.TemporaryDirectory(prefix="penstock-doctor-") as scratch, tempfile.TemporaryFile() as log:
        own = {"XDG_CACHE_HOME": scratch, "XDG_CONFIG_HOME": scratch}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)} | own
        command = [*platform.PYTHON, "-c", PROGRAM, "serve", str(model), "--port", str(port)]
        command += ["--memory-limit", str(limit)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            while _health(url).get("status") != "ok":
                if process.poll() is not None or time.monotonic() > end:
                    raise SelfTestProblem(f"the server did not come up (exit code {process.poll()})")
                time.sleep(0.2)
            yield process, url
        finally:
            process.kill()
            process.wait()


def _health(url: str) -> dict[str, Any]:
    with suppress(ServerProblem):
        return dict(get(url, "/health", None)[1])
    return {}


def _watch(url: str, seen: Seen, over: Flag) -> None:
    last = False
    while not last:
        last = over.wait(0.1)
        said = _health(url)
        seen.deaths = max(seen.deaths, said.get("engine_deaths") or 0)
        if memory := said.get("memory"):
            seen.held = max(seen.held, memory["active"] + memory["pooled"], sum(memory["accounts"].values()))
            seen.ceiling, seen.counts = memory["ceiling"], memory["counts"]


def report(about: Mapping[str, str], figures: Figures, seen: Seen) -> tuple[bool, str]:
    """Whether every promise was kept, and what to paste. `about`: versions and the machine."""
    share = seen.held / max(1, seen.ceiling)
    kept = not figures["lost"] and not seen.deaths and seen.exit_code == 0 and 0 < share <= 1
    lines = {
        "self-test": "passed" if kept else "FAILED",
        **about,
        "budget": f"{gigabytes(seen.ceiling)}; held at most {gigabytes(seen.held)}, {share:.0%} of it",
        "processes": f"{gigabytes(figures['peak_bytes'] or 0)} at most, Python and libraries included",
        "requests": f"{figures['answered']} answered, {figures['left']} hung up on, {figures['lost']} lost",
        "errors": listed(figures["errors"]),
        "engine": f"{seen.deaths} deaths; the server's exit code is {seen.exit_code}",
        "measures": listed(seen.counts),
        "first token": ", ".join(f"{k} {v:.2f} s" for k, v in (figures["first_token"] or {}).items()),
        "time": f"{figures['seconds']:.0f} s",
    }
    return kept, "\n".join(f"{name:<12} {text}" for name, text in lines.items())
