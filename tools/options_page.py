"""`make docs`: prints docs/options.md, the page of all options, from the fields of config.py."""

from __future__ import annotations

from itertools import groupby

from penstock import config
from penstock.cli import arguments


def reference() -> str:
    """The text of docs/options.md."""
    lines = [
        "# Options",
        "",
        "Generated from `src/penstock/config.py` by `make docs`. Each option of `penstock serve` is a flag, "
        "a variable and a key of a TOML file (`--config`, else `PENSTOCK_CONFIG`, else "
        "`~/.config/penstock/config.toml`). A flag goes before the variable, the variable before the file. "
        "`penstock serve --print-config` prints what is in force and where it was set. A switch has a "
        "negative form: `--no-demo`. Sizes: `8G` and `512MB` are decimal, `8GiB` is binary, `75%` is of this "
        "machine's memory.",
    ]
    for name, options in groupby(config.listed(), key=lambda option: option.metadata["group"]):
        titles = "| flag | variable | key | default | meaning |"
        lines += ["", f"## {name}", "", titles, "|---|---|---|---|---|"]
        for option in options:
            flag = f"{config.flag_of(option)} {option.metadata['form'].metavar}".strip()
            names = (f"`{written}`" for written in (flag, config.variable_of(option), option.name))
            cells = (*names, arguments.default(option), arguments.meaning(option))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
