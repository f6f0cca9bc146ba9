"""Coding agents do a two-turn tool task while their prompt takes longer to compute than they wait in silence.

They give up after 300 s without a sign of life that they count as one. The slow test has the real 330 s and
the real keepalive interval; the quick one has both divided by fifty, which shows the same order of events but
not that an agent's own limit is passed.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.agents import AGENTS
from tests.support.serve_scripted import ScriptedServer

PREFILL, KEEPALIVE = 330.0, 10.0


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(50.0, marks=pytest.mark.clients, id="compressed"),
        pytest.param(1.0, marks=pytest.mark.clients_slow, id="real time"),
    ],
)
@pytest.mark.parametrize("agent", AGENTS)
def test_it_reads_a_file_and_answers(
    model_dir: Path, tmp_path: Path, agent: ModuleType, factor: float
) -> None:
    program = agent.installed()
    if program is None:
        pytest.skip("npm is not installed")
    project = tmp_path / "project"
    project.mkdir()
    secret = "heron-" + secrets.token_hex(4)
    (project / "note.txt").write_text(f"The bird in the picture is a {secret}.\n")
    asked = f'"name": "{agent.TOOL}"'
    arguments = json.dumps(agent.arguments(project / "note.txt"))
    call = ["<tool_call>", f'\n{{{asked}, "arguments": {arguments}}}\n', "</tool_call>"]
    with ScriptedServer(model_dir, tmp_path, keepalive=KEEPALIVE / factor) as server:
        server.rules(
            {"when": secret, "pieces": ["The note names ", secret, "."], "step": 0.01},
            {"when": asked, "pieces": call, "prefill": PREFILL / factor, "step": 0.01},
            {"when": "", "pieces": ["A title"]},
        )
        task = "Read note.txt and say which bird it names."
        outcome = agent.run(program, server.url, tmp_path, task, 120 + PREFILL / factor)
        submitted = [event["rule"] for event in server.events("submit")]
        assert outcome.code == 0, (outcome, server.log()[-3000:])
        assert secret in outcome.said
        assert submitted.count(asked) == 1, "it gave up and asked again"
        assert submitted.count(secret) == 1
        assert "Traceback" not in server.log()
