"""A short request that comes while a very long prompt is computed: it is next, and the prompt loses nothing.

How long that takes is shown by `penstock bench --profile chatty`. Here the engine writes down what it
computes, and counts are compared, which are the same on any machine.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.models import prompt_text, write_model_dir
from tests.storm.subjects import SHAPES
from tests.support import scaled_models
from tests.support.traced_engine import SERVE
from tests.support.whole_server import WholeServer

from penstock.memory.costs import CHUNK_FLOOR

LONG, SHORT = 3_000, 180
"""Words of the prompts; the template adds some."""
LATER = 2
"""Short requests that come together, after the first."""


def test_a_short_request_behind_a_long_prompt_is_next(tmp_path: Path) -> None:
    model = write_model_dir(
        tmp_path / "model",
        scaled_models.config_of("qwen3", **SHAPES["qwen3"], max_position_embeddings=8_192),
    )
    trace = tmp_path / "trace"
    environment = {"PENSTOCK_TEST_TRACE": str(trace), "PENSTOCK_TEST_TOGETHER": str(2 + LATER)}
    flags = ("--prefill-step-size", "512")
    with (
        WholeServer(model, tmp_path, *flags, environment=environment, program=SERVE) as server,
        ThreadPoolExecutor(2 + LATER) as clients,
    ):
        answers = [clients.submit(server.ask, prompt_text(LONG, 1), 4)]
        while '"chunk"' not in trace.read_text():
            assert not answers[0].done()
        answers += [clients.submit(server.ask, prompt_text(SHORT, 2 + at), 8) for at in range(1 + LATER)]
        assert all(answer.result().answered for answer in answers), server.log()[-3000:]
        counts = server.health()["memory"]["counts"]
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    long, *shorts = [event["id"] for event in events if event["event"] == "submit"]
    for place, id_ in enumerate(shorts):
        own, others = _before_first_token(events, id_, long)
        assert own == 1, "it was not computed in one piece"
        # Before it was taken on board one chunk may have been under way; that is in no list here.
        assert others <= 1 + place, f"{others} chunks of the long prompt before number {place}"
    chunks = [event for event in events if event["event"] == "chunk"]
    _nothing_is_computed_twice([c for c in chunks if c["id"] == long], LONG)
    for chunk in chunks:
        if chunk["streams"] and chunk["allowed"] is not None:
            assert chunk["length"] <= max(CHUNK_FLOOR, chunk["allowed"])
    assert counts.get("preempt", 0) == 0


def _before_first_token(events: list[dict[str, Any]], id_: int, long: int) -> tuple[int, int]:
    """Chunks that were launched between a request's arrival and its first id: its own, the long prompt's."""
    names = [(event["event"], event["id"]) for event in events]
    between = names[names.index(("submit", id_)) : names.index(("token", id_))]
    return between.count(("chunk", id_)), between.count(("chunk", long))


def _nothing_is_computed_twice(chunks: list[dict[str, Any]], words: int) -> None:
    """One chunk begins where the one before ended, up to the last id, which a decode step takes."""
    reached = 0
    for chunk in chunks:
        assert chunk["start"] == reached
        reached += chunk["length"]
    assert words < reached < words + 40
