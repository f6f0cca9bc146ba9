"""The command `penstock`: reads what was asked, says in one sentence what cannot be, and starts the rest.

Refuses: doing any of the work itself, and importing what only the work needs: `penstock --help` must be
quick. Exit codes: 0 done, 2 for what only the user can mend, 1 for what a restart may.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from penstock import __version__
from penstock.cli import arguments, bench, doctor, plan, status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (the process's) and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="penstock",
        description="An OpenAI-compatible LLM server for Apple's MLX.",
        epilog="`penstock serve --help` lists the options of the server.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"penstock {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    arguments.add_serve(commands)
    plan.add(commands)
    bench.add(commands)
    status.add(commands)
    doctor.add(commands)
    asked = parser.parse_args(argv)
    try:
        return int(importlib.import_module(f"penstock.cli.{asked.command}").run(asked))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
