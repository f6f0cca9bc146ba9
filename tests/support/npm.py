"""Client programs from npm, installed into a cache outside the repository, and run headless.

Refuses the user's own configuration: what runs gets a temporary home and no more of the environment than it
names.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("PENSTOCK_CLIENTS") or Path.home() / ".cache" / "penstock-clients")
SYSTEM = {"Linux": "linux", "Darwin": "darwin"}.get(platform.system(), "")
MACHINE = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "")


def installed(package: str, program: str) -> Path | None:
    """`program`, a path below node_modules, installed with `package` if need be; None without npm."""
    folder = CACHE / package.replace("/", "-")
    path = folder / "node_modules" / program
    if not path.exists():
        if shutil.which("npm") is None:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        command = ["npm", "install", "--no-audit", "--no-fund", package]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
    return path


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    said: str
    noise: str


def run(command: Sequence[Path | str], scratch: Path, timeout: float, **environment: str) -> Outcome:
    """The command in scratch/project, its home scratch/home. Raises subprocess.TimeoutExpired."""
    project, home = scratch / "project", scratch / "home"
    for folder in (project, home):
        folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        cwd=project,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
