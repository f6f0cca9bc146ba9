"""The real engine killed at random under real traffic: no stream is cut, no text differs.

Prints how long it took from each death to the next id at a client, and what of it was the load.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tests.support import tiny_models
from tests.support.traffic import Traffic, bodies
from tests.support.whole_server import WholeServer

WIDTH = 8
WAITING = 4
"""Streams that have no id yet, queued or in prefill, at every death; plain requests do not tell."""
CONTEXT = 16384


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer and one head: 8,000 ids take little more than a second on a slow CPU."""
    path = tmp_path_factory.mktemp("chaos") / "model"
    path.mkdir()
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = tiny_models.config_of("qwen3", **small, max_position_embeddings=CONTEXT)
    weights = dict(tree_flatten(tiny_models.make(config, scale=3.0).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    (path / "config.json").write_text(json.dumps(config))
    tiny_models.write_tokenizer(path)
    return path


async def engine(server: WholeServer, since: int = 0) -> int:
    """The pid of an engine that is ready, other than `since`."""
    while True:
        health = await asyncio.to_thread(server.health)
        if health.get("status") == "ok" and health["engine"]["pid"] != since:
            return int(health["engine"]["pid"])
        await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Death:
    """Seconds from it to the next engine's readiness, and to the next id; streams that had no id yet."""

    load: float
    token: float
    waiting: int


async def kill_at_random(server: WholeServer, traffic: Traffic, kills: int) -> list[Death]:
    draw = random.Random(5)
    deaths = []
    pid = await engine(server)
    for _ in range(kills):
        await asyncio.sleep(draw.uniform(0.05, 0.8))
        while len(traffic.waiting) < WAITING:
            await asyncio.sleep(0.005)
        assert traffic.open == WIDTH
        waiting, died = len(traffic.waiting), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        pid = await engine(server, pid)
        ready = time.monotonic()
        while traffic.last_token < ready - 0.1:
            await asyncio.sleep(0.01)
        deaths.append(Death(ready - died, max(traffic.last_token, ready) - died, waiting))
    return deaths


def quantiles(seconds: Iterable[float]) -> str:
    ordered = sorted(seconds)
    median, most = statistics.median(ordered), ordered[len(ordered) * 95 // 100]
    return f"median {median:.2f} s, 95th percentile {most:.2f} s"


async def play(server: WholeServer, kills: int, longest: int) -> None:
    requests = bodies(24, longest=longest)
    expected = await Traffic(server.url, requests, WIDTH).once()
    assert all(answer.broken is None for answer in expected)
    traffic = Traffic(server.url, requests, WIDTH)
    running = asyncio.create_task(traffic.run())
    deaths = await kill_at_random(server, traffic, kills)
    traffic.stopping = True
    await running
    cut = [(at, answer.broken) for at, answer in traffic.answers if answer.broken is not None]
    other = [at for at, answer in traffic.answers if answer.broken is None and answer != expected[at]]
    print(
        f"\n{kills} kills, {len(traffic.answers)} answers: {len(cut)} cut, {len(other)} with other texts; "
        f"streams without an id at the death: {statistics.mean(d.waiting for d in deaths):.1f} of {WIDTH}"
        f"\ndeath to next id: {quantiles(d.token for d in deaths)}"
        f"\n  start and load: {quantiles(d.load for d in deaths)}"
        f"\n  then, prefill computed again: {quantiles(d.token - d.load for d in deaths)}"
    )
    assert all(death.waiting >= WAITING for death in deaths)
    assert cut == []
    assert other == [], [(expected[at].texts, at) for at in other[:1]]
    assert (await asyncio.to_thread(server.health))["engine_deaths"] == kills


@pytest.mark.parametrize(("kills", "longest"), [(20, 3000), pytest.param(200, 8000, marks=pytest.mark.chaos)])
def test_no_stream_is_cut_and_no_text_differs(model: Path, tmp_path: Path, kills: int, longest: int) -> None:
    with WholeServer(model, tmp_path, "--prompt-concurrency", "4") as server:
        asyncio.run(asyncio.wait_for(play(server, kills, longest), 120 + 20 * kills))
        log = server.log()
    assert "Traceback" not in log, log[-3000:]
