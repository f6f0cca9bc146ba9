"""Codex, a coding agent, headless: requests go to the server under test alone."""

from __future__ import annotations

from pathlib import Path

from tests.support import npm

VERSION = "0.171.0"
TOOL = "exec_command"
_CPU = {"x64": "x86_64", "arm64": "aarch64"}.get(npm.MACHINE, "")
_SYSTEM = {"linux": "unknown-linux-musl", "darwin": "apple-darwin"}.get(npm.SYSTEM, "")
CONFIG = """\
model = "local"
model_provider = "penstock"
model_context_window = 131072
check_for_update_on_startup = false

[model_providers.penstock]
name = "Penstock"
base_url = "{url}/v1"
wire_api = "responses"
"""


def arguments(path: Path) -> dict[str, str]:
    """Of the tool, to read a file."""
    return {"cmd": f"cat '{path}'"}


def errand(task: str) -> tuple[str, dict[str, str]] | None:
    """The call that sends out a sub-agent, where it has them; this one waits for none."""
    return None


def installed() -> Path | None:
    """The program, installed if need be; None without npm."""
    package = f"@openai/codex-{npm.SYSTEM}-{npm.MACHINE}"
    return npm.installed(f"@openai/codex@{VERSION}", f"{package}/vendor/{_CPU}-{_SYSTEM}/bin/codex")


def run(program: Path, url: str, scratch: Path, task: str, timeout: float, *flags: str) -> npm.Outcome:
    """`codex exec TASK` against the server at `url`. Raises subprocess.TimeoutExpired."""
    settings = scratch / "home" / ".codex"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "config.toml").write_text(CONFIG.format(url=url))
    # Its own sandbox does not start in every container; what it runs here is what the test has it run.
    command = [program, "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", *flags, task]
    return npm.run(command, scratch, timeout)
