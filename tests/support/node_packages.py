"""JavaScript packages from npm, as programs of `tests/clients/programs` use them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support import npm

OPENAI = "openai@7.59.0"
ANTHROPIC = "@anthropic-ai/sdk@1.14.0"


def installed(package: str) -> list[Path | str] | None:
    """node and the node_modules with `package` (NAME@VERSION), installed if need be; None without npm."""
    name = package.rpartition("@")[0]
    manifest, node = npm.installed(package, f"{name}/package.json"), shutil.which("node")
    if manifest is None or node is None:
        return None
    return [node, manifest.parents[1 + name.count("/")]]
