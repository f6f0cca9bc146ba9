"""A budget that promises more than the system gives: engines die of allocations until it has come down."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from array import array
from pathlib import Path

import pytest
from bench.models import write_model_dir
from tests.support.tickets import hear, run
from tests.support.whole_server import ROOT

from penstock import wire
from penstock.memory.probe import system_probe
from penstock.supervisor.backend import Backend, Job
from penstock.supervisor.warden import Warden

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory"),
]
COMMAND = (sys.executable, str(ROOT / "tests/support/faulty_engine.py"))
LIMIT = 300 << 20
SHARE = 0.6
"""Of the ceiling: where the hard limit really is, but for the 64 MiB that it allows besides."""
REQUESTS, PROMPT, ANSWER = 8, 200, 8
"""131 KB of KV a token: 27 MB each and as much in the cache, more in all than the budget."""


def jobs() -> list[Job]:
    ids = random.Random(3).choices(range(300, 900), k=REQUESTS * PROMPT)
    prompts = [array("I", ids[at * PROMPT : (at + 1) * PROMPT]) for at in range(REQUESTS)]
    return [Job(prompt, wire.Sampling(), max_tokens=ANSWER, ignore_eos=True) for prompt in prompts]


async def answers(model: Path, share: float) -> tuple[list[list[int]], Backend]:
    """Everything at once, then everything again; what was heard first and last."""
    backend = Backend(
        COMMAND,
        environment={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PENSTOCK_TEST_FAULT": f"fence:{share}"},
        warden=Warden(system_probe(), LIMIT),
    )
    backend.start(wire.EngineOptions(str(model), hard_memory_limit=True))
    try:
        heard = []
        for _ in range(2):
            tickets = [backend.open(job) for job in jobs()]
            heard += [list((await hear(ticket, 120.0)).ids[0]) for ticket in tickets]
        await asyncio.sleep(1.0)  # the books come twice a second
        assert backend.status is not None
        backend.last_budget = backend.status.budget  # type: ignore[attr-defined]
        return heard, backend
    finally:
        await backend.stop(0.0)


def test_an_engine_with_less_than_its_budget_comes_back_with_less_and_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model_dir(tmp_path / "model", "wide-kv")
    expected, calm = run(answers(model, 1.0), 120)
    assert calm.snapshot()["engine_deaths"] == 0, "within the limit that it was told, nothing fails"
    heard, backend = run(answers(model, SHARE), 240)
    assert heard == expected
    deaths = backend.snapshot()["engine_deaths"]
    assert deaths >= 1, "no allocation failed: the test shows nothing"
    assert caplog.text.count("it looks like memory") == deaths
    assert backend.last_budget < calm.last_budget  # type: ignore[attr-defined]
    assert backend.warden.ceiling == calm.warden.ceiling
