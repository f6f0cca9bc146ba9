"""`penstock bench`: plays traffic against servers that are running, this one's or a peer's, side by side.

Each round sends the same requests to each server in turn, the next round in the other order and with other
texts, so that nobody has them cached. Refuses: starting a server. Exit codes: 0 if no request was lost, 1 if
some were, 2 for a wrong option or a server that cannot be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from penstock.traffic.profiles import PROFILES, Event, to_lines

if TYPE_CHECKING:
    from penstock.traffic.watch import Run

URL = "http://127.0.0.1:8080/v1"
Target = tuple[str, str, int | None]
"""URL, model, process."""


def add(commands: Any) -> None:
    """Add the parser of `penstock bench` to argparse's sub-commands."""
    parser = commands.add_parser(
        "bench",
        help="play agents' traffic against running servers, side by side",
        description=__doc__,
        allow_abbrev=False,
    )
    add_option, number, count = parser.add_argument, above_0(float), above_0(int)
    again = {"action": "append"}
    add_option("--url", **again, type=named, metavar="[NAME=]URL", help=f"again: one beside it ({URL})")
    add_option("--model", **again, help="for all servers, or one for each (the first that each lists)")
    add_option("--pid", **again, type=int, help="whose memory to watch, for each (who holds its port here)")
    add_option("--profile", choices=PROFILES, default="issue1390", help="the traffic (%(default)s)")
    add_option("--trace", type=Path, metavar="FILE", help="play this trace in Mooncake's form instead")
    add_option("--speed", type=number, default=1.0, help="times faster than the trace says (%(default)s)")
    add_option("--block", type=count, default=512, help="tokens of a hash id in the trace (%(default)s)")
    add_option("--scale", type=number, default=1.0, help="multiplies all lengths (%(default)s)")
    add_option("--sessions", type=count, help="sessions at a time (the profile's own number)")
    add_option("--rounds", type=count, default=1, help="how often each server is played to (%(default)s)")
    add_option("--seed", type=int, default=0, help="another seed is other traffic (%(default)s)")
    add_option("--timeout", type=number, default=3600, help="seconds to wait for an answer (%(default)s)")
    add_option("--events", action="store_true", help="print the requests, one a line, and end")
    add_option("--json", type=Path, metavar="FILE", help="write the figures and all records there")
    add_option("--html", type=Path, metavar="FILE", help="write the table and charts there, as one page")


def above_0(cast: Any) -> Any:
    """A type of argparse's: what `cast` makes of the text, if that is above zero."""

    def parse(text: str) -> Any:
        if not 0 < (value := cast(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    parse.__name__ = "number"
    return parse


def run(asked: argparse.Namespace) -> int:
    """Play the traffic and print what came of it."""
    from penstock.traffic.client import ServerProblem

    key = os.environ.get("OPENAI_API_KEY")
    try:
        rounds = [_events(asked, asked.seed + number) for number in range(asked.rounds)]
        if asked.events:
            sys.stdout.write(to_lines(rounds[0]))
            return 0
        targets = _targets(asked, key)
    except (ValueError, OSError, ServerProblem) as problem:
        print(f"penstock: {problem}", file=sys.stderr)
        return 2
    return _report(asked, targets, _play(targets, rounds, key, asked.timeout))


def _events(asked: argparse.Namespace, seed: int) -> Sequence[Event]:
    from penstock.traffic import trace

    if asked.trace is not None:
        return trace.load(asked.trace, asked.speed, asked.scale, seed, asked.block)
    sessions = {} if asked.sessions is None else {"sessions": asked.sessions}
    return PROFILES[asked.profile](seed, asked.scale, **sessions)


def _targets(asked: argparse.Namespace, key: str | None) -> dict[str, Target]:
    """The servers by name, each reached once. Raises ValueError, ServerProblem."""
    from penstock.traffic.client import ServerProblem, served_model
    from penstock.traffic.watch import local_pid

    urls = asked.url or [named(URL)]
    pids, models = asked.pid or [None] * len(urls), asked.model or [None]
    models = models * len(urls) if len(models) == 1 else models
    if not len(models) == len(pids) == len(urls) <= 4:
        raise ValueError("--url: four servers at most; --model: one, or one for each; --pid: one for each.")
    targets: dict[str, Target] = {}
    for (name, url), named_model, pid in zip(urls, models, pids, strict=True):
        listed = served_model(url, key)
        if (model := named_model or listed) is None:
            raise ServerProblem(f"{url} lists no model: name it with --model (mlx_lm.server: default_model).")
        if name in targets:
            raise ValueError(f"--url: two servers are called {name}; write NAME=URL.")
        targets[name] = (url, model, pid or local_pid(url))
    return targets


def named(text: str) -> tuple[str, str]:
    """A type of argparse's: name and base URL of `[NAME=]URL`; a URL without a path gets /v1."""
    name, _, rest = ("", "", text) if text.startswith("http") else text.partition("=")
    address = urlsplit(rest.rstrip("/"))
    if address.scheme not in ("http", "https") or not address.hostname:
        raise argparse.ArgumentTypeError(f"must be an address such as {URL}, not {text!r}")
    return name or address.netloc, address._replace(path=address.path or "/v1").geturl()


def _play(
    targets: dict[str, Target], rounds: Sequence[Sequence[Event]], key: str | None, timeout: float
) -> dict[str, list[Run]]:
    """Every round, with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from penstock.traffic.client import Player
    from penstock.traffic.watch import run_watched

    runs: dict[str, list[Run]] = {name: [] for name in targets}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for number, events in enumerate(rounds):
            for name in list(targets)[:: -1 if number % 2 else 1]:
                url, model, pid = targets[name]
                task = bar.add_task(f"round {number + 1}, {name}", total=len(events))
                player = Player(url, model, key, timeout)
                player.fit_words()
                player.on_record = lambda record, task=task: bar.advance(task, not record.again)  # type: ignore[misc]
                runs[name].append(run_watched(player, events, pid))
    return runs


def _report(asked: argparse.Namespace, targets: dict[str, Target], runs: dict[str, list[Run]]) -> int:
    from penstock.traffic import report

    found = {name: report.summary(each) for name, each in runs.items()}
    table = report.rows(found)
    traffic = f"{asked.trace.name if asked.trace else asked.profile} × {asked.scale:g}"
    models = (f"{name} serves {Path(model).name}" for name, (_, model, _) in targets.items())
    about = f"{traffic}, seed {asked.seed}, rounds: {asked.rounds}; {', '.join(models)}"
    data = {"about": about, "summary": found, "table": table, "runs": runs}
    text = json.dumps(data, default=lambda run: run.told())
    if asked.json:
        asked.json.write_text(text)
    if asked.html:
        asked.html.write_text(report.page(text), encoding="utf-8")
    print(f"{about}\n\n{report.markdown(table)}")
    return 1 if any(figures["lost"] for figures in found.values()) else 0
