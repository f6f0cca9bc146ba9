"""Schemathesis against /openapi.json: every operation, with bodies that it allows and bodies that it forbids.

One of its checks is left out, that a body which the document allows is never refused: a schema cannot say
that ids lie below the vocabulary's size, that one of `content`, `prompt` and `messages` is given, that a
prompt's list is of one kind, that a content part is text, or what roles a chat template knows.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.support import python_clients
from tests.support.whole_server import WholeServer

pytestmark = pytest.mark.conformance
FLAGS = ("--memory-limit", "60MB", "--max-tokens", "32")
"""A thousand tools are a prompt of 26,000 tokens, and there are many such bodies: here they are refused."""


@pytest.mark.parametrize("seed", [1, 2])
def test_the_server_is_as_its_document_says(demo: WholeServer, tmp_path: Path, seed: int) -> None:
    python = python_clients.installed("requirements-conformance.lock")
    if python is None:
        pytest.skip("schemathesis is not installed, and no registry can be reached")
    command = [
        python.with_name("schemathesis"),
        "run",
        f"{demo.url}/openapi.json",
        "--seed",
        str(seed),
        "--max-examples",
        "50",
    ]
    options = ["--exclude-checks", "positive_data_acceptance", "--request-timeout", "600", "--no-color"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:]
