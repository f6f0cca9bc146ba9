"""/metrics, read by Prometheus' own parser: names, meanings, and that it comes whatever the engine does."""

from __future__ import annotations

import contextlib
import os
import signal
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.api.test_status import SECRET, STREAM, told
from tests.support.client_model import write_client_model
from tests.support.hang_ups import post, until
from tests.support.serve_scripted import ScriptedServer

VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_prefill_time_seconds_bucket",
    "vllm:request_decode_time_seconds_bucket",
}
OURS = {
    "penstock_engine_up",
    "penstock_measures_total",
    "penstock_engine_deaths_total",
    "penstock_continuations_total",
    "penstock_audit_repairs_total",
    "penstock_cancels_total",
    "penstock_front_held_bytes",
    "penstock_prefilled_tokens_total",
}
LABELS = {"model_name", "owner", "reason", "measure", "stage", "kind", "finished_reason", "le"}
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    scratch = tmp_path_factory.mktemp("metrics")
    with ScriptedServer(write_client_model(scratch / "model"), scratch) as server:
        yield server


def scrape(server: ScriptedServer) -> Samples:
    """Values by name and by the label beside the model's name."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.read().decode()
    assert SECRET not in text
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert set(labels) <= LABELS
            assert labels.pop("model_name") == "model"
            key = (sample.name, *labels.values())
            assert key not in found, "said twice"
            found[(sample.name, "".join(labels.values()))] = sample.value
    return found


def test_the_names_are_vllms_and_ours(server: ScriptedServer) -> None:
    assert {name for name, _ in scrape(server)} >= VLLM | OURS


def test_what_is_counted_is_what_was_asked_and_answered(server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["x"] * 20, "step": 0.01})
    before = scrape(server)
    with contextlib.closing(post(server.port, STREAM)) as stream:
        until(stream, b"[DONE]")
    after = scrape(server)

    def rise(name: str, label: str = "") -> float:
        return after[name, label] - before[name, label]

    assert rise("vllm:generation_tokens_total") == 21, "the end of turn counts"
    assert rise("vllm:request_success_total", "stop") == 1
    assert rise("vllm:time_to_first_token_seconds_count") == 1
    assert rise("vllm:inter_token_latency_seconds_count") == 20
    assert 0.2 <= rise("vllm:inter_token_latency_seconds_sum") <= rise("vllm:e2e_request_latency_seconds_sum")
    assert rise("vllm:e2e_request_latency_seconds_bucket", "+Inf") == 1
    parts = ("queue", "prefill", "decode")
    whole = sum(rise(f"vllm:request_{part}_time_seconds_sum") for part in parts)
    assert whole == pytest.approx(rise("vllm:e2e_request_latency_seconds_sum"))


def test_buckets_rise(server: ScriptedServer) -> None:
    found = scrape(server)
    buckets = [v for (name, _), v in found.items() if name == "vllm:inter_token_latency_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found["vllm:inter_token_latency_seconds_count", ""]


def test_who_runs_and_who_leaves_is_counted(server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["word "] * 1000, "step": 0.05})
    before = scrape(server)
    with contextlib.closing(post(server.port, STREAM)) as stream:
        until(stream, b'"content":"', 2)
        assert scrape(server)["vllm:num_requests_running", ""] == 1
    server.until(lambda: scrape(server)["vllm:num_requests_running", ""] == 0)
    after = scrape(server)
    assert after["penstock_cancels_total", "decode"] - before["penstock_cancels_total", "decode"] == 1
    assert after["vllm:request_success_total", "abort"] - before["vllm:request_success_total", "abort"] == 1


def test_a_scrape_works_while_the_engine_is_dead_and_counts_go_on(server: ScriptedServer) -> None:
    before = scrape(server)
    os.kill((told(server).engine or {})["pid"], signal.SIGKILL)
    up = set()
    server.until(
        lambda: (
            up.add((now := scrape(server))["penstock_engine_up", ""])
            or now["penstock_engine_deaths_total", ""] > before["penstock_engine_deaths_total", ""]
        )
    )
    server.until(lambda: up.add(scrape(server)["penstock_engine_up", ""]) or told(server).state == "ready")
    assert 0.0 in up
    after = scrape(server)
    fallen = [key for key, value in before.items() if "_total" in key[0] and after[key] < value]
    assert not fallen
