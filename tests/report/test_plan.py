"""What `penstock plan` promises, `penstock serve` keeps: the longest prompt, sessions side by side, bytes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from bench.models import prompt_text, write_model_dir
from tests.storm.subjects import SHAPES
from tests.support import scaled_models
from tests.support.hang_ups import leave, post, until
from tests.support.whole_server import PENSTOCK, WholeServer

LIMITS = {"qwen3": "30MB", "qwen3_5": "60MB", "qwen3_moe": "45MB"}
"""A dense model, a hybrid with head_dim 256, a mixture of experts: so little that prompts are short."""
TEMPLATE = 19
"""Tokens that the template adds to a prompt's own."""
SESSION = 2_000
ANSWER = 1_024


def planned(model: Path, limit: str, scratch: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*PENSTOCK, "plan", str(model), "--memory-limit", limit, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(scratch / "cache")},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(name, marks=pytest.mark.storm) for name in ("qwen3_5", "qwen3_moe"))]
)
def test_what_is_promised_is_served(name: str, tmp_path: Path) -> None:
    """The longest prompt, not one 5 % longer; the sessions, all at once; weights and KV as in the books."""
    config = scaled_models.config_of(name, **SHAPES[name], max_position_embeddings=65_536)
    model, limit = write_model_dir(tmp_path / "model", config), LIMITS[name]
    estimated = planned(model, limit, tmp_path)
    with WholeServer(model, tmp_path, "--memory-limit", limit) as server:
        plan = planned(model, limit, tmp_path)
        assert (estimated["steps"], plan["steps"]) == ("estimated", "measured")
        longest = plan["longest"]
        assert longest * 0.5 < estimated["longest"] <= longest * 1.05
        print(f"\n{name}: {limit}, longest {longest}, sessions {plan['sessions'][str(SESSION)]}")
        _sessions_run_at_once(server, plan, to_the_end=name != "qwen3")
        _longest_prompt_is_served(server, longest)


def _longest_prompt_is_served(server: WholeServer, longest: int) -> None:
    assert server.health()["max_model_len"] == longest
    served = server.ask(prompt_text(longest - TEMPLATE - 1, 1), 8)
    assert served.body["usage"]["prompt_tokens"] == longest - 1
    assert (served.answered, served.finish_reason) == (True, "length")
    refused = server.ask(prompt_text(longest * 105 // 100 - TEMPLATE, 2), 8)
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    assert server.health()["memory"]["counts"].get("giveup", 0) == 0


def _sessions_run_at_once(server: WholeServer, plan: dict[str, Any], to_the_end: bool) -> None:
    """As many as are promised, each in mid-answer at the same moment; then they leave, or end."""
    count = plan["sessions"][str(SESSION)]["at_once"]
    assert 2 <= count < 32, "the memory is to be what bounds it"
    clients = [post(server.port, _session(seed)) for seed in range(count)]
    begun = [until(client, b'"content":"', 3) for client in clients]
    assert not any(b'finish_reason":"' in text for text in begun), "one had ended before another began"
    memory = _look(server, count)
    ends = [until(client, b"[DONE]") if to_the_end else b"" for client in clients]
    for client, end in zip(clients, ends, strict=True):
        assert not to_the_end or b'"completion_tokens":%d' % ANSWER in end
        leave(client, reset=False)
    row = plan["fixed_bytes_per_sequence"] + plan["kv_bytes_per_token"] * (SESSION + ANSWER)
    assert memory["accounts"]["live_kv"] == pytest.approx(count * row, rel=0.01)
    assert memory["accounts"]["weights"] == pytest.approx(plan["weights_bytes"], rel=0.01)
    assert (server.health()["memory"]["counts"] | memory["counts"]).get("preempt", 0) == 0


def _session(seed: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt_text(SESSION - TEMPLATE, 10 + seed)}]
    fields = {"max_tokens": ANSWER, "temperature": 0, "stream": True}
    return {**fields, "messages": messages, "stream_options": {"include_usage": True}}


def _look(server: WholeServer, count: int) -> dict[str, Any]:
    """The books, which are told twice a second, as they are while all run."""
    for _ in range(1200):
        memory: dict[str, Any] = server.health()["memory"] or {}
        if memory.get("running") == count:
            return memory
        time.sleep(0.05)
    raise AssertionError(f"they do not run all at once: {memory}")
