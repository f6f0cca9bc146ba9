"""`penstock status`: what a running server does and holds, live in the terminal, once, or as JSON.

Refuses: guessing. What does not answer is said so. Exit codes: 0 if a server answered, whatever its engine
does; 1 if none did, which a start may mend; 2 for a wrong address or key.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from penstock.errors import StartProblem

if TYPE_CHECKING:
    from rich.console import Console

URL = "http://127.0.0.1:8080"
TIMEOUT = 5.0


def add(commands: Any) -> None:
    """Add the parser of `penstock status` to argparse's sub-commands."""
    parser = commands.add_parser(
        "status", help="show what a running server does and holds", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--url", default=URL, help="the server (%(default)s); its key: $PENSTOCK_API_KEY")
    parser.add_argument("--once", action="store_true", help="print it once (the default where no one looks)")
    parser.add_argument("--json", action="store_true", help="print what the server answers, once")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between looks (%(default)s)")


def run(asked: argparse.Namespace) -> int:
    """Show it until interrupted, or once."""
    url = asked.url.rstrip("/").removesuffix("/v1")
    try:
        _check(url)
        answer = ask(url)
        if asked.json:
            sys.stdout.buffer.write(answer + b"\n")
            return 0
        from rich.console import Console

        console = Console(highlight=False)
        if asked.once or not console.is_terminal:
            from penstock.cli.status_view import View

            console.print(View(read(url, answer), whole=True))
            return 0
        _watch(console, url, answer, max(0.1, asked.interval))
    except StartProblem as problem:
        print(f"penstock: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        pass  # how one leaves it
    return 0


def _check(url: str) -> None:
    from urllib.parse import urlsplit

    try:
        address = urlsplit(url)
        good = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # a port that is no number, half a bracket
        good = False
    if not good:
        raise StartProblem(f"--url {url} is no http address.")


def ask(url: str) -> bytes:
    """The body of /v1/status. Raises StartProblem."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, Request, build_opener

    key = os.environ.get("PENSTOCK_API_KEY")
    try:
        request = Request(f"{url}/v1/status", headers={"Authorization": f"Bearer {key}"} if key else {})
        with build_opener(ProxyHandler({})).open(request, timeout=TIMEOUT) as answer:
            return bytes(answer.read())
    except HTTPError as refused:
        refused.close()
        wrong = f"what answers at {url} is no Penstock ({refused.code} {refused.reason})."
        asks = f"{url} asks for a key: set PENSTOCK_API_KEY."
        raise StartProblem(asks if refused.code == 401 else wrong) from None
    except (OSError, HTTPException) as error:
        why = getattr(error, "reason", error)
        why = getattr(why, "strerror", None) or why
        raise StartProblem(f"no server answers at {url} ({why}).", exit_code=1) from None


def read(url: str, answer: bytes) -> Any:
    """The `Status` of an answer. Raises StartProblem."""
    import msgspec

    from penstock.status import Status

    try:
        return msgspec.json.decode(answer, type=Status)
    except msgspec.DecodeError:
        raise StartProblem(f"what answers at {url} is no Penstock, or another version.") from None


def _watch(console: Console, url: str, answer: bytes, interval: float) -> None:
    from rich.live import Live

    from penstock.cli.status_view import View

    told, heard = read(url, answer), time.monotonic()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            silent = time.monotonic() - heard
            live.update(View(told, silent=silent if silent > 2 * interval else 0.0), refresh=True)
            time.sleep(interval)
            try:
                told, heard = read(url, ask(url)), time.monotonic()
            except StartProblem as problem:
                if problem.exit_code != 1:
                    raise
