"""/v1/status and what an operator may do there, with whole servers: scripted engines, and the demo model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.client_model import write_client_model
from tests.support.hang_ups import post, until
from tests.support.serve_scripted import ScriptedServer
from tests.support.whole_server import WholeServer

from penstock import models, status, wire

SECRET = "heron in the reeds"
STREAM = {"messages": [{"role": "user", "content": SECRET}], "stream": True}
OWNERS = {"weights", "pool", "live_kv", "states", "cached", "grammars", "transient"}


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    scratch = tmp_path_factory.mktemp("status")
    with ScriptedServer(write_client_model(scratch / "model"), scratch) as server:
        yield server


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    with WholeServer(models.DEMO, tmp_path_factory.mktemp("demo"), "--served-model-name", "demo") as server:
        yield server


def call(
    server: ScriptedServer | WholeServer, path: str, data: bytes | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and JSON of an answer; a POST if there is a body, and be it empty."""
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.load(refused)


def told(server: ScriptedServer | WholeServer) -> status.Status:
    code, body = call(server, "/v1/status")
    assert code == 200
    assert SECRET not in json.dumps(body)
    return msgspec.convert(body, status.Status)


def only(server: ScriptedServer) -> status.Request | None:
    """The one open request, if there is one."""
    requests = told(server).requests
    assert len(requests) <= 1
    return requests[0] if requests else None


def stage(server: ScriptedServer) -> str | None:
    request = only(server)
    return request.stage if request else None


def test_the_parts_of_memory_add_up_to_what_the_ledger_holds(whole: WholeServer) -> None:
    with contextlib.closing(post(whole.port, STREAM | {"max_tokens": 400, "ignore_eos": True})) as stream:
        until(stream, b'"content":"', 5)
        seen: dict[str, int] = {}
        end = time.monotonic() + 60
        while not seen.get("live_kv") and time.monotonic() < end:
            memory = told(whole).memory
            assert set(memory.owners) == OWNERS
            assert sum(memory.owners.values()) == memory.held
            assert memory.budget is not None
            assert memory.held <= memory.budget
            seen = memory.owners
        memory, front = told(whole).memory, whole.health()["front"]
    assert seen["weights"] > 0
    assert seen["live_kv"] > 0
    assert (memory.ceiling, memory.ceiling_decided_by) == (
        whole.health()["memory"]["ceiling"],
        "physical memory",
    )
    assert memory.front_held > 0
    assert front["held_bytes"] <= memory.front_limit
    assert memory.active is not None
    assert memory.active <= memory.held, "what MLX holds has its lease"


def test_a_request_is_told_of_from_its_prompt_to_its_memory(whole: WholeServer) -> None:
    with contextlib.closing(post(whole.port, STREAM | {"max_tokens": 2000, "ignore_eos": True})) as stream:
        until(stream, b'"content":"', 5)
        end = time.monotonic() + 60
        while (request := told(whole).requests[0]).bytes is None and time.monotonic() < end:
            time.sleep(0.05)
        state = told(whole)
    assert (request.path, request.stream, request.stage) == ("/v1/chat/completions", True, "decode")
    assert (request.max_tokens, request.cached + request.prefilled > 0) == (2000, True)
    assert request.prompt > 0
    assert request.generated >= 5
    assert request.tokens_per_second
    assert request.bytes
    assert request.why
    assert (state.running, state.queued, state.state) == (1, 0, "ready")
    assert state.facts is not None
    assert state.versions.keys() >= {"penstock", "python", "mlx", "mlx-lm"}


def test_clearing_the_cache_drops_prefixes_and_no_row(whole: WholeServer) -> None:
    whole.ask("a prompt that is kept " * 30, 3)
    wait(lambda: told(whole).cache.bytes > 0 and told(whole).cache.tree)
    cached = told(whole).cache
    assert sum(node.bytes for node in cached.tree) <= cached.bytes
    assert (cached.nodes, cached.tokens > 0, cached.queries > 0) == (len(cached.tree), True, True)
    with contextlib.closing(post(whole.port, STREAM | {"max_tokens": 300, "ignore_eos": True})) as stream:
        until(stream, b'"content":"', 3)
        assert call(whole, "/v1/cache/clear", b"") == (200, {"cleared": True})
        rest = until(stream, b"[DONE]")
    assert b'"finish_reason":"length"' in rest
    wait(lambda: told(whole).cache.evicted.get("cleared", 0) > 0)


def wait(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_history_is_of_the_last_seconds_and_can_be_asked_from_a_time_on(whole: WholeServer) -> None:
    code, body = call(whole, "/v1/status/history")
    past = msgspec.convert(body, status.History)
    assert code == 200
    assert set(past.owners) == OWNERS
    lengths = {len(column) for column in (past.budget, past.running, *past.owners.values())}
    assert lengths == {len(past.time)}
    _, later = call(whole, f"/v1/status/history?since={past.time[-1]}")
    assert all(at > past.time[-1] for at in later["time"])
    code, refused = call(whole, "/v1/status/history?since=yesterday")
    assert (code, refused["error"]["param"]) == (400, "since")


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [({"queued": 60}, "queued"), ({"prefill": 60}, "prefill"), ({"step": 0.05}, "decode")],
)
def test_a_cancelled_stream_ends_with_an_error_whatever_its_stage(
    server: ScriptedServer, rule: dict[str, Any], wanted: str
) -> None:
    server.rules({"when": "", "pieces": ["word "] * 1000, **rule})
    before = told(server).cancels.get(wanted, 0)
    with contextlib.closing(post(server.port, STREAM)) as stream:
        until(stream, b'"role":"assistant"')
        server.until(lambda: stage(server) == wanted)
        request = only(server)
        assert request is not None
        assert call(server, f"/v1/requests/{request.id}/cancel", b"") == (
            200,
            {"id": request.id, "cancelled": True},
        )
        rest = until(stream, b"\r\n0\r\n\r\n")
    assert b'"code":"request_cancelled"' in rest
    assert b"[DONE]" not in rest
    assert server.until(lambda: server.events("end"))[-1]["known"]
    state = told(server)
    assert (state.cancels[wanted], state.requests) == (before + 1, [])
    assert call(server, f"/v1/requests/{request.id}/cancel", b"")[0] == 404


def test_progress_of_a_prefill_comes_with_the_time_that_is_left(server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["x"], "prefill": 60})
    long = STREAM | {"messages": [{"role": "user", "content": "word " * 3000}]}
    with contextlib.closing(post(server.port, long)):
        server.until(lambda: (found := only(server)) and found.eta and found.seconds > 1)
        request = only(server)
        assert request is not None
        assert 0 < request.prefilled < request.prompt
        assert request.eta is not None
        assert 10 < request.eta < 600
    server.until(lambda: not told(server).requests)


def test_who_does_not_stream_is_told_so_once(server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["word "] * 1000, "step": 0.05})
    answers: list[tuple[int, Any]] = []
    body = json.dumps(STREAM | {"stream": False}).encode()
    headers = {"Content-Type": "application/json"}
    asking = threading.Thread(
        target=lambda: answers.append(call(server, "/v1/chat/completions", body, **headers))
    )
    asking.start()
    server.until(lambda: stage(server) == "decode")
    request = only(server)
    assert request is not None
    assert not request.stream
    assert call(server, f"/v1/requests/{request.id[:8]}/cancel", b"")[0] == 200, "as the log names it"
    asking.join(20)
    ((code, answer),) = answers
    assert (code, answer["error"]["code"]) == (400, "request_cancelled")
    assert told(server).errors["cancelled"] >= 1


@pytest.mark.parametrize("path", ["/v1/requests/x/cancel", "/v1/cache/clear"])
def test_actions_are_posts_of_our_own_origin(server: ScriptedServer, path: str) -> None:
    assert call(server, path)[0] == 405
    assert call(server, path, b"", Origin="http://evil.example")[0] == 403
    assert call(server, path, b"", Origin=server.url)[0] in (200, 404)


def test_status_is_served_while_the_engine_stands_still_and_while_it_is_dead(
    server: ScriptedServer,
) -> None:
    pid = (told(server).engine or {})["pid"]
    deaths = told(server).counts["engine_deaths"]
    os.kill(pid, signal.SIGSTOP)
    assert told(server).state == "ready"
    os.kill(pid, signal.SIGKILL)
    states = set()
    server.until(lambda: states.add((state := told(server)).state) or state.counts["engine_deaths"] > deaths)
    state = told(server)
    assert state.events[0].kind == "engine_death"
    assert state.events[0].advice
    server.until(lambda: states.add(told(server).state) or told(server).state == "ready")
    assert "restarting" in states
    assert told(server).memory.owners == {}, "this engine tells nothing of its books"


def test_status_is_served_before_there_is_an_engine(tmp_path: Path) -> None:
    server = ScriptedServer(write_client_model(tmp_path / "model"), tmp_path)
    try:
        seen = set()

        def look() -> bool:
            with contextlib.suppress(urllib.error.URLError):
                seen.add(told(server).state)
            return "ready" in seen

        server.until(look, 30)
    finally:
        server.stop()
    assert seen & {"downloading", "loading"}


def test_a_refused_request_is_counted_and_told_of_with_advice(server: ScriptedServer) -> None:
    facts = told(server).facts
    assert facts is not None
    long = {"messages": [{"role": "user", "content": "word " * facts.context_length}]}
    before = told(server).errors.get("context_length", 0)
    code, _ = call(
        server, "/v1/chat/completions", json.dumps(long).encode(), **{"Content-Type": "application/json"}
    )
    state = told(server)
    assert (code, state.errors["context_length"]) == (400, before + 1)
    assert state.events[0].kind == "context_length"
    assert "penstock plan" in state.events[0].advice


def test_the_schema_names_the_paths(server: ScriptedServer) -> None:
    paths = call(server, "/openapi.json")[1]["paths"]
    assert {"/v1/status", "/v1/status/history", "/metrics"} <= paths.keys()
    assert "post" in paths["/v1/requests/{id}/cancel"]
    assert "post" in paths["/v1/cache/clear"]


def test_every_answer_fits_the_shape(whole: WholeServer) -> None:
    code, body = call(whole, "/v1/status")
    assert code == 200
    assert set(body) == set(status.Status.__struct_fields__)
    assert set(body["memory"]) == set(status.Memory.__struct_fields__)
    assert set(body["cache"]) == set(status.Cache.__struct_fields__)
    nodes = body["cache"]["tree"]
    assert all(set(node) == set(wire.Prefix.__struct_fields__) for node in nodes)
