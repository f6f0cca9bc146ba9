"""Claude Code, a coding agent, headless: requests go to the server under test alone."""

from __future__ import annotations

from pathlib import Path

from tests.support import npm

VERSION = "2.1.197"
TOOL = "Read"


def arguments(path: Path) -> dict[str, str]:
    """Of the tool, to read a file."""
    return {"file_path": str(path)}


def errand(task: str) -> tuple[str, dict[str, str]] | None:
    """The call that sends out a sub-agent, where it has them."""
    return "Agent", {"description": "an errand", "prompt": task, "subagent_type": "general-purpose"}


def installed() -> Path | None:
    """The program, installed if need be; None without npm."""
    package = f"@anthropic-ai/claude-code@{VERSION}"
    return npm.installed(package, f"@anthropic-ai/claude-code-{npm.SYSTEM}-{npm.MACHINE}/claude")


def run(program: Path, url: str, scratch: Path, task: str, timeout: float) -> npm.Outcome:
    """`claude -p TASK` against the server at `url`, allowed to read. Raises subprocess.TimeoutExpired."""
    return npm.run(
        [program, "-p", task, "--allowedTools", "Read"],
        scratch,
        timeout,
        ANTHROPIC_BASE_URL=url,
        ANTHROPIC_AUTH_TOKEN="none",
        ANTHROPIC_MODEL="local",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_AUTOUPDATER="1",
    )
