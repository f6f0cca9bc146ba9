"""`penstock doctor`: looks at the machine, the model and a running server, and says what to change.

Refuses: changing anything, and loading MLX in this process. Exit codes: 0 if nothing fails, 1 if something
does, 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from penstock.cli.bench import above_0, named

if TYPE_CHECKING:
    from penstock.doctor.checks import Finding

MARKS = {"ok": ("✓", 32), "warn": ("!", 33), "fail": ("✗", 31)}
"""The mark of each level, and the number of its colour on a terminal."""


def add(commands: Any) -> None:
    """Add the parser of `penstock doctor` to argparse's sub-commands."""
    parser = commands.add_parser(
        "doctor",
        help="check the machine, a model and a running server, and say what to change",
        description=__doc__,
        allow_abbrev=False,
    )
    add_option = parser.add_argument
    add_option("model", nargs="?", metavar="MODEL", help="a directory or a hub name (the demo model)")
    add_option("--url", type=named, help="a running server (the one on the configured port, if any)")
    add_option("--trust-remote-code", action="store_true", help="as for penstock serve")
    add_option("--self-test", action="store_true", help="play a storm to a server with little memory")
    add_option("--scale", type=above_0(float), default=0.03, help="of the storm's lengths (%(default)s)")
    add_option("--json", action="store_true", help="print what was found as JSON")


def run(asked: argparse.Namespace) -> int:
    """Print what was found."""
    found: list[Finding] = []
    plan: dict[str, Any] = {}
    for finding in _findings(asked, plan):
        found.append(finding)
        if not asked.json:
            _print(finding)
    kept, report = all(finding.level != "fail" for finding in found), None
    if kept and asked.self_test:
        kept, report = _self_test(asked, plan)
    if asked.json:
        told = {"findings": [asdict(finding) for finding in found], "self_test": report}
        print(json.dumps(told, indent=1, ensure_ascii=False))
    elif report:
        print(f"\n{report}")
    return 0 if kept else 1


def _findings(asked: argparse.Namespace, plan: dict[str, Any]) -> Iterator[Finding]:
    """All findings, in order. `plan` takes the model's figures, and `path` if it is on this machine."""
    from penstock import models, platform
    from penstock.cli.plan import described, figures
    from penstock.doctor import checks, examine

    if sentence := platform.backend_problem():
        yield checks.graded("machine", sentence, fail=True)
        return
    trusted = asked.trust_remote_code
    try:
        with described(asked.model or str(models.DEMO), trusted) as (path, tensors):
            plan.update(figures(path, tensors, trusted=trusted), path=None if tensors else path)
    except (models.ModelProblem, ValueError, OSError) as problem:
        yield checks.graded("model", str(problem), fail=True, change="name a model that can be read")
        return
    yield from examine.machine(plan, 0 if plan["path"] else plan["weights_bytes"])
    if plan["path"]:
        yield from examine.model(plan["path"], trust_remote_code=trusted)
    yield from checks.fits(plan)
    yield from _served(asked.url and asked.url[1], str(plan["path"] or models.DEMO), trusted)


def _served(url: str | None, model: str, trusted: bool) -> Iterator[Finding]:
    """A server that runs, and whether the options in force would start one."""
    from penstock import config, platform
    from penstock.cli import arguments, serve
    from penstock.doctor import checks, examine
    from penstock.errors import StartProblem

    key, running = os.environ.get("OPENAI_API_KEY"), []
    try:
        options = serve.with_key_file(arguments.resolved(arguments.nothing_asked(), os.environ).options)
        key = key or next(iter(options.api_key), None)
        if url or platform.port_holder(options.port):
            here = url or f"http://127.0.0.1:{options.port}/v1"
            running = list(examine.server(here, key))
        ours = any(finding.what.startswith("penstock ") for finding in running)
        yield from running if url or ours else ()
        if ours:
            options = replace(options, port=0)  # the configured one is in use, as it should be
        serve.examine(replace(options, model=model, demo=False, trust_remote_code=trusted))
        yield checks.graded("options", f"a server would start on {options.host}")
    except (config.ConfigError, StartProblem) as problem:
        yield checks.graded("options", str(problem), fail=True, change="see `penstock serve --print-config`")


def _print(finding: Finding) -> None:
    mark, colour = MARKS[finding.level]
    shown = f"\033[{colour}m{mark}\033[0m" if sys.stdout.isatty() else mark
    print(f"{shown} {finding.area:<8} {finding.what}")
    if finding.change:
        print(f"{'':>11}→ {finding.change}")


def _self_test(asked: argparse.Namespace, plan: dict[str, Any]) -> tuple[bool, str]:
    """Whether it passed, and the report."""
    import platform

    from penstock import __version__
    from penstock.cli.plan import figures
    from penstock.doctor import examine, selftest
    from penstock.traffic.profiles import PROFILES

    events = PROFILES["storm"](scale=asked.scale)
    try:
        if plan["path"] is None:
            raise selftest.SelfTestProblem("the model is not on this machine, and nothing is downloaded")
        ask = partial(figures, plan["path"], trusted=asked.trust_remote_code)
        limit = selftest.budget(lambda size: ask(limit=size), plan, events)
        print(f"{len(events)} requests under {limit / 1e6:,.0f} MB …", file=sys.stderr)
        found, seen = selftest.run(plan["path"], limit, events)
    except selftest.SelfTestProblem as problem:
        return False, f"self-test    not run: {problem}"
    mlx = f"mlx {examine.version('mlx')}, mlx-lm {examine.version('mlx-lm')}"
    about = {
        "versions": f"penstock {__version__}, {mlx}, Python {platform.python_version()}",
        "machine": f"{plan['machine']}, {plan['backend']}, {platform.platform()}",
        "model": f"{plan['model_type']}, weights {plan['weights_bytes'] / 1e6:,.0f} MB",
    }
    return selftest.report(about, found, seen)
