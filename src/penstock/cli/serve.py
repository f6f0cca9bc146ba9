"""`penstock serve`: everything that can be refused before a port is open, each in one sentence.

Refuses: serving; that is `penstock.front`. Invariant: when `front.run` is called, the options agree with
each other, the port was free, and what is on this machine of the model has been looked at.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys

from penstock import config, log, models, platform
from penstock.cli import arguments
from penstock.errors import StartProblem
from penstock.memory.probe import system_probe
from penstock.sizes import gigabytes


def run(asked: argparse.Namespace) -> int:
    """Serve until told to stop. Returns the exit code."""
    try:
        resolved = arguments.resolved(asked, os.environ)
        if asked.print_config:
            sys.stdout.write(arguments.as_toml(resolved))
            return 0
        examine(resolved.options)
    except (StartProblem, config.ConfigError) as problem:
        print(f"penstock: {problem}", file=sys.stderr)
        return getattr(problem, "exit_code", 2)
    options = resolved.options
    log.setup(options.log_level, form=options.log_format)
    for name in config.unknown_variables(os.environ):
        log.logger.warning(f"{name} is set, but there is no such option.")
    from penstock import front

    return front.run(options)


def examine(options: config.Options) -> None:
    """Raise StartProblem for the first thing that keeps these options from being served."""
    if sentence := config.refusal(options):
        raise StartProblem(sentence)
    if not options.demo and options.model is None:
        raise StartProblem(choices(models.found_in_cache()))
    if options.demo and options.model is not None:
        raise StartProblem("--demo and a model exclude each other: take one of them away.")
    if options.api_key is None and not is_loopback(options.host):
        raise StartProblem(f"--host {options.host} can be reached from other machines: set --api-key too.")
    if options.api_key == "":
        raise StartProblem("--api-key is empty: give a key, or leave it away.")
    if sentence := platform.backend_problem():
        raise StartProblem(sentence)
    try:
        system_probe()
        if options.model is None:
            models.check(models.DEMO)
        else:
            models.precheck(options.model, trust_remote_code=options.trust_remote_code)
        platform.listen(options.host, options.port).close()
    except ValueError as pretended:
        raise StartProblem(f"{pretended}.") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def choices(cached: dict[str, int]) -> str:
    """What could be served here, each as a command to paste."""
    lines = ["no model is named."]
    if cached:
        lines.append("In the hub cache:")
        lines += [f"  penstock serve {name}    # {gigabytes(size)}" for name, size in cached.items()]
    else:
        lines.append("The hub cache holds none; a hub name or a directory works: penstock serve MODEL")
    lines += ["The bundled demo model:", "  penstock serve --demo"]
    return "\n".join(lines)
