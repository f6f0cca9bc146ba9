"""The Python programs that talk to servers, in virtual environments of their own, outside the repository.

Theirs are locks of their own, so that the tests' environment stays small. An environment is made once for
each lock and Python, and kept.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.support import npm

ROOT = Path(__file__).parents[2]
UNREACHABLE = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError")


def installed(lock: str = "requirements-clients.lock") -> Path | None:
    """A lock's Python; None where the packages are missing and no registry can be reached."""
    digest = hashlib.sha256((ROOT / lock).read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = npm.CACHE / f"python-{digest}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        command = [python, "-m", "pip", "install", "-q", "--require-hashes", "-r", ROOT / lock]
        pip = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        if pip.returncode and any(sign in pip.stderr for sign in UNREACHABLE):
            return None
        assert pip.returncode == 0, pip.stderr[-3000:]
        done.touch()
    return python
