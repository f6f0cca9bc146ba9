"""`penstock bench`: plays a traffic profile against a server that is running, this one or another.

Refuses: starting a server. Exit codes: 0 if no request was lost, 1 if some were, 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

URL = "http://127.0.0.1:8080/v1"
PROFILES = ("issue1390",)


def add(commands: Any) -> None:
    """Add the parser of `penstock bench` to argparse's sub-commands."""
    parser = commands.add_parser(
        "bench", help="play agents' traffic against a running server", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--profile", choices=PROFILES, default=PROFILES[0], help="the traffic (%(default)s)")
    parser.add_argument("--url", default=URL, help="OpenAI-compatible base URL (%(default)s)")
    parser.add_argument("--model", default="default_model", help="the model to name in requests")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all lengths (%(default)s)")
    parser.add_argument("--sessions", type=int, default=10, help="sessions at a time (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is other traffic (%(default)s)")
    parser.add_argument(
        "--events", action="store_true", help="print the profile's requests, one a line, and end"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and all records there")


def run(asked: argparse.Namespace) -> int:
    """Play the profile and print what came of it."""
    from penstock.traffic.profiles import issue1390, to_lines
    from penstock.traffic.report import table
    from penstock.traffic.watch import run_watched

    address = urlsplit(asked.url)
    if address.scheme not in ("http", "https") or not address.hostname or asked.scale <= 0:
        print("penstock: --url must be an http address, and --scale above 0.", file=sys.stderr)
        return 2
    events = issue1390(asked.seed, asked.scale, asked.sessions)
    if asked.events:
        sys.stdout.write(to_lines(events))
        return 0
    figures, records = run_watched(
        asked.url.rstrip("/"), asked.model, os.environ.get("OPENAI_API_KEY"), events
    )
    if asked.json:
        asked.json.write_text(json.dumps({"summary": figures, "records": records}, indent=1))
    print(table(figures))
    return 1 if figures["lost"] else 0
