"""The options of config.py as argparse flags and as a TOML text, and what is said of each.

Nothing here knows a single option: all is generated from the fields. A flag's text goes unparsed to
`config.resolve`, so that flags, variables and file share one parser and one wording of errors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import Field
from itertools import groupby
from pathlib import Path
from typing import Any

from penstock import config
from penstock.sizes import gigabytes

CONFIG_VARIABLE = config.PREFIX + "CONFIG"


def add_serve(commands: Any) -> None:
    """Add the parser of `penstock serve` to argparse's sub-commands."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP with OpenAI's API. Each option can also be set by a variable "
        "PENSTOCK_<OPTION> or a key of the config file; a flag goes before a variable, that before the file.",
        allow_abbrev=False,
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    parser.add_argument(
        "--config", metavar="FILE", help="a TOML file with options (default: ~/.config/penstock/config.toml)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the options in force, as TOML, and exit"
    )
    for name, options in groupby(config.listed(), key=lambda option: option.metadata["group"]):
        group = parser.add_argument_group(name)
        for option in options:
            _add(group, option)


def _add(group: Any, option: Field[Any]) -> None:
    form: config.Form = option.metadata["form"]
    shared = {
        "dest": option.name,
        "default": None,
        "help": f"{meaning(option)} ({default(option)})".replace("%", "%%"),
    }
    if form is config.SWITCH:
        group.add_argument(config.flag_of(option), action=argparse.BooleanOptionalAction, **shared)
    else:
        action = "append" if form.many else "store"
        group.add_argument(config.flag_of(option), action=action, metavar=form.metavar, **shared)


def resolved(asked: argparse.Namespace, environment: Mapping[str, str]) -> config.Resolved:
    """The options in force for a parsed command line. Raises config.ConfigError."""
    flags: dict[str, str | None] = {}
    for option in config.listed():
        given = getattr(asked, option.name)
        if isinstance(given, bool):
            given = "true" if given else "false"
        flags[option.name] = ",".join(given) if isinstance(given, list) else given
    if asked.positional_model is not None:
        if flags["model"] not in (None, asked.positional_model):
            raise config.ConfigError("Two models are named: give MODEL or --model, not both.")
        flags["model"] = asked.positional_model
    path = _config_file(asked.config, environment)
    return config.resolve(flags, environment, _read(path) if path else {}, str(path))


def nothing_asked() -> argparse.Namespace:
    """A command line without any flag: what `resolved` makes of it comes from variables and the file."""
    names = (option.name for option in config.listed())
    return argparse.Namespace(**dict.fromkeys(names), positional_model=None, config=None)


def _config_file(flag: str | None, environment: Mapping[str, str]) -> Path | None:
    named = flag or environment.get(CONFIG_VARIABLE)
    if named:
        return Path(named).expanduser()
    folder = Path(environment.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    usual = folder / "penstock" / "config.toml"
    return usual if usual.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # not needed for --help, which is to be quick

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise config.ConfigError(f"{path} cannot be read: {reason}.") from None


def as_toml(resolved: config.Resolved) -> str:
    """The options in force as a config file that sets them again; secrets are named, not shown."""
    lines = []
    for option in config.listed():
        value, source = getattr(resolved.options, option.name), resolved.sources.get(option.name, "default")
        secret = option.metadata.get("secret")
        if secret and value:
            lines.append(f"# {option.name} is set by {source}")
        elif value is None or secret:
            lines.append(f"# {option.name} is not set: {option.metadata.get('unset', 'none')}")
        else:
            size = f" = {gigabytes(value)}" if option.metadata["form"] is config.SIZE else ""
            lines.append(f"{option.name} = {_literal(value)}  # {source}{size}")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return _literal(json.dumps(value))
    if isinstance(value, str):  # JSON's string escapes are TOML's, save for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def meaning(option: Field[Any]) -> str:
    """What an option does, and what becomes of one that has no effect here."""
    meaning = str(option.metadata["help"])
    for key, verb in (("refused", "Refused"), ("accepted", "Accepted without effect")):
        if key in option.metadata:
            meaning += f" {verb}: {option.metadata[key]}."
    return meaning


def default(option: Field[Any]) -> str:
    """What holds where an option is not set, for people."""
    value = config.default_of(option)
    if value in (None, (), "") or isinstance(value, dict):
        return str(option.metadata.get("unset", "none"))
    if isinstance(value, bool):
        return "on" if value else "off"
    if option.metadata["form"] is config.SIZE:
        return gigabytes(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
