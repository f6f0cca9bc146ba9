"""The coding agents that the tests run, as parameters of a test: modules that all have the same functions."""

from __future__ import annotations

import pytest
from tests.support import claude_code, codex, opencode

AGENTS = [
    pytest.param(opencode, id="opencode"),
    pytest.param(claude_code, id="Claude Code"),
    pytest.param(codex, id="Codex"),
]
