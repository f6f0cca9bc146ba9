"""What `penstock plan` promises, `penstock serve` keeps."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from bench.models import prompt_text
from tests.support.whole_server import PENSTOCK, WholeServer

LIMIT = ("--memory-limit", "150MB")
TEMPLATE = 19
"""Tokens that the template adds to a prompt's own."""


def planned(model: Path, scratch: Path) -> dict[str, object]:
    done = subprocess.run(
        [*PENSTOCK, "plan", str(model), *LIMIT, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(scratch / "cache")},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_longest_prompt_that_is_promised_is_served(wide: Path, tmp_path: Path) -> None:
    """And one 5 % longer gets the 400."""
    estimated = planned(wide, tmp_path)
    with WholeServer(wide, tmp_path, *LIMIT) as server:
        plan = planned(wide, tmp_path)
        assert (estimated["steps"], plan["steps"]) == ("estimated", "measured")
        health = server.health()
        longest = plan["longest"]
        assert isinstance(longest, int)
        assert longest == health["max_model_len"]
        assert isinstance(estimated["longest"], int)
        assert longest * 0.5 < estimated["longest"] <= longest * 1.05
        assert plan["weights_bytes"] == health["weights_bytes"]
        served = server.ask(prompt_text(longest - TEMPLATE - 1, 1), 8)
        assert served.body["usage"]["prompt_tokens"] == longest - 1
        assert (served.answered, served.finish_reason) == (True, "length")
        refused = server.ask(prompt_text(longest * 105 // 100 - TEMPLATE, 2), 8)
        assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
