"""llmprobe, from npm, against the demo model: what it holds against the engine is listed here.

The grades of the model are left aside: it is a few megabytes large.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.support.npm import installed
from tests.support.whole_server import WholeServer

pytestmark = pytest.mark.conformance

KNOWN = {
    # Anthropic's `input_tokens` leave out what came from the cache; the suite takes them for the prompt.
    ("messages", "usage tokens"),
    ("messages", "prompt cache reporting"),
    ("messages", "prefix cache reuses a growing conversation"),
    # OpenAI's own stream has no `[DONE]` here, and calls thinking `response.reasoning_text.delta`.
    ("responses", "streaming + SSE framing"),
    # 32 tokens to repeat a random text: this small model may spend them all on its thought.
    ("chat", "concurrent identical requests agree"),
    ("messages", "concurrent identical requests agree"),
    ("responses", "concurrent identical requests agree"),
}


@pytest.fixture(scope="module")
def report(demo: WholeServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = installed("llmprobe", "llmprobe/bin/dist/llmprobe.mjs")
    if program is None:
        pytest.skip("npm is not installed")
    folder: Path = tmp_path_factory.mktemp("llmprobe")
    saved = folder / "report.json"
    options = ["--no-bench", "--no-save", "--full", "--no-color", "--timeout", "600", "--save", str(saved)]
    done = subprocess.run(
        ["node", str(program), demo.url, *options],
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin:/usr/local/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert saved.exists(), done.stdout[-5000:] + done.stderr[-5000:]
    return dict(json.loads(saved.read_text()))


def test_what_fails_is_known(report: dict[str, Any]) -> None:
    results = report["conformance"]["results"]
    failed = {
        (one["surface"], one["name"].partition(": ")[2]): [why["message"] for why in one["failures"]]
        for one in results
        if one["outcome"] == "fail"
    }
    unknown = [f"{name}: {why}" for name, why in failed.items() if name not in KNOWN]
    assert not unknown, "\n".join(unknown)
    assert len([one for one in results if one["outcome"] == "pass"]) > 40


def test_each_surface_that_is_there_was_found(report: dict[str, Any]) -> None:
    found = {entry["id"] for entry in report["coverage"]["entries"] if entry["supported"]}
    assert {"models", "chat", "messages", "completions"} <= found, found
