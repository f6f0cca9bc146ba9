"""opencode, a coding agent, headless: requests go to the server under test alone."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support import npm

VERSION = "1.18.33"
TOOL = "read"


def arguments(path: Path) -> dict[str, str]:
    """Of the tool, to read a file."""
    return {"filePath": str(path)}


def errand(task: str) -> tuple[str, dict[str, str]] | None:
    """The call that sends out a sub-agent, where it has them."""
    return "task", {"description": "an errand", "prompt": task, "subagent_type": "general"}


def installed() -> Path | None:
    """The program, installed if need be; None without npm."""
    return npm.installed(f"opencode-ai@{VERSION}", f"opencode-{npm.SYSTEM}-{npm.MACHINE}/bin/opencode")


def run(program: Path, url: str, scratch: Path, task: str, timeout: float) -> npm.Outcome:
    """`opencode run TASK` against the server at `url`. Raises subprocess.TimeoutExpired."""
    model = {"name": "m", "limit": {"context": 131072, "output": 8192}}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "local",
        "options": {"baseURL": url + "/v1", "apiKey": "none"},
        "models": {"m": model},
    }
    config = {"provider": {"local": provider}, "model": "local/m", "autoupdate": False, "share": "disabled"}
    (scratch / "project").mkdir(exist_ok=True)
    (scratch / "project" / "opencode.json").write_text(json.dumps(config))
    return npm.run(
        [program, "run", "--model", "local/m", task],
        scratch,
        timeout,
        OPENCODE_DISABLE_MODELS_FETCH="1",
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
    )
