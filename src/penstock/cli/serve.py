"""`penstock serve`: everything that can be refused before a port is open, each in one sentence.

Refuses: serving; that is `penstock.front`. Invariant: when `front.run` is called, the options agree with
each other, the port was free, and what is on this machine of the model has been looked at.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

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
        options = with_key_file(resolved.options)
        examine(options)
    except (StartProblem, config.ConfigError) as problem:
        print(f"penstock: {problem}", file=sys.stderr)
        return getattr(problem, "exit_code", 2)
    log.setup(options.log_level, form=options.log_format)
    for name in config.unknown_variables(os.environ):
        log.logger.warning(f"{name} is set, but there is no such option.")
    if options.api_key_file and others_can_read(options.api_key_file):
        log.logger.warning(f"{options.api_key_file} holds API keys, and others can read it: chmod 600 it.")
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
    if not (options.api_key or options.keyless or is_loopback(options.host)):
        raise StartProblem(
            f"--host {options.host} can be reached from other machines: set --api-key or --api-key-file, "
            "or let everybody in with --keyless."
        )
    if options.api_key and options.keyless:
        raise StartProblem("--keyless and API keys exclude each other: take one of them away.")
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


def with_key_file(options: config.Options) -> config.Options:
    """The options with the keys of the key file among their own. Raises StartProblem; never names a key."""
    name = options.api_key_file
    if name is None:
        return options
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise StartProblem(f"--api-key-file {name} cannot be read: {reason}.") from None
    numbered = [(at, text) for at, line in enumerate(lines, 1) if (text := line.strip()) and text[0] != "#"]
    for at, text in numbered:
        if not config.KEY.fullmatch(text):
            raise StartProblem(
                f"--api-key-file {name}, line {at}: a key is visible ASCII, no space or comma."
            )
    if not numbered:
        raise StartProblem(f"--api-key-file {name} holds no key.")
    return replace(options, api_key=(*options.api_key, *(text for _, text in numbered)))


def others_can_read(name: str) -> bool:
    """Whether other users of this machine may read a file."""
    return bool(Path(name).expanduser().stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


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
