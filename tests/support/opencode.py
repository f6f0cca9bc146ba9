"""opencode, a coding agent, headless: installed from npm into a cache outside the repository, and run.

Refuses: the user's own configuration and any request but those to the server under test: home and
configuration are temporary, the environment is empty otherwise, updates and model lists are switched off.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

VERSION = "1.18.33"
CACHE = Path(os.environ.get("PENSTOCK_CLIENTS") or Path.home() / ".cache" / "penstock-clients")


def installed() -> Path | None:
    """The program, installed if need be; None without npm."""
    system = {"Linux": "linux", "Darwin": "darwin"}[platform.system()]
    machine = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
    program = CACHE / "node_modules" / f"opencode-{system}-{machine}" / "bin" / "opencode"
    if not program.exists():
        if shutil.which("npm") is None:
            return None
        CACHE.mkdir(parents=True, exist_ok=True)
        (CACHE / "package.json").write_text('{"private": true}')
        command = ["npm", "install", "--no-audit", "--no-fund", f"opencode-ai@{VERSION}"]
        subprocess.run(command, cwd=CACHE, check=True, capture_output=True, timeout=600)
    return program


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    said: str
    noise: str


def run(program: Path, url: str, scratch: Path, task: str, timeout: float) -> Outcome:
    """`opencode run TASK` in scratch/project, its home scratch/home, against the server at `url`.

    Raises subprocess.TimeoutExpired.
    """
    model = {"name": "m", "limit": {"context": 40960, "output": 8192}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "local",
        "options": {"baseURL": url + "/v1", "apiKey": "none"},
        "models": {"m": model},
    }
    config = {"provider": {"local": provider}, "model": "local/m", "autoupdate": False, "share": "disabled"}
    project, home = scratch / "project", scratch / "home"
    for folder in (project, home):
        folder.mkdir(exist_ok=True)
    (project / "opencode.json").write_text(json.dumps(config))
    environment = {
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    }
    done = subprocess.run(
        [program, "run", "--model", "local/m", task],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
