"""/metrics for Prometheus: what /v1/status tells, as families of a registry of its own, read at each scrape.

vLLM's names where they mean the same here, `penstock_` for the rest. Answers from what the front knows, so a
scrape works while the engine loads or is dead. Invariant: labels take few values, all from tables of this
program; no text of a prompt is in any of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from penstock.api.exchange import Exchange
from penstock.api.service import Service
from penstock.api.status import status
from penstock.status import Status
from penstock.supervisor.observer import MEASURES, STAGES, Histogram

_FINISHED = ("stop", "length", "abort", "error")


class _Collector(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        model = self._service.model_name
        told = status(self._service)
        yield from _gauges(told, partial(_family, GaugeMetricFamily, model))
        yield from _counters(told, partial(_family, CounterMetricFamily, model))
        histogram, seen = partial(_histogram, model), self._service.backend.observer
        yield histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", seen.first_token)
        yield histogram("vllm:inter_token_latency_seconds", "Between tokens of a choice.", seen.gaps)
        yield histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", seen.whole)
        yield histogram("vllm:request_queue_time_seconds", "Until the prompt is begun.", seen.queue)
        yield histogram("vllm:request_prefill_time_seconds", "From there to the first token.", seen.prefill)
        yield histogram("vllm:request_decode_time_seconds", "First token to end.", seen.decode)


def _gauges(told: Status, gauge: Any) -> Iterator[Metric]:
    memory, cache = told.memory, told.cache
    room = (memory.budget or 0) - memory.owners.get("weights", 0)
    used = memory.owners.get("live_kv", 0) + memory.owners.get("states", 0)
    share = used / room if room > 0 else 0.0
    leased, held = memory.predicted_transient, memory.measured_transient
    yield gauge("vllm:num_requests_running", "Choices on board.", told.running)
    yield gauge("vllm:num_requests_waiting", "Choices that wait.", told.queued)
    yield gauge("vllm:kv_cache_usage_perc", "Held by rows, of budget less weights; 1: all.", share)
    yield gauge("penstock_engine_up", "1 while the engine takes work.", float(told.state == "ready"))
    yield gauge("penstock_uptime_seconds", "Since the server's start.", told.uptime)
    yield gauge("penstock_memory_bytes", "Held by the engine.", memory.owners, "owner")
    yield gauge("penstock_memory_budget_bytes", "What the engine may hold now.", memory.budget)
    yield gauge("penstock_memory_ceiling_bytes", "What it may ever hold.", memory.ceiling)
    yield gauge("penstock_memory_active_bytes", "What MLX says that it holds.", memory.active)
    yield gauge("penstock_memory_pooled_bytes", "Freed buffers that MLX keeps.", memory.pooled)
    yield gauge("penstock_front_held_bytes", "Held by the HTTP process for requests.", memory.front_held)
    yield gauge("penstock_transient_predicted_bytes", "Leased for the costliest last step.", leased)
    yield gauge("penstock_transient_measured_bytes", "What that step held.", held)
    yield gauge("penstock_cache_tokens", "In the prompt cache.", cache.tokens)
    yield gauge("penstock_cache_nodes", "Of the prompt cache's tree.", cache.nodes)
    yield gauge("penstock_cache_checkpoints", "States in the prompt cache.", cache.checkpoints)


def _counters(told: Status, counter: Any) -> Iterator[Metric]:
    cache, counts = told.cache, told.counts
    finished = {reason: told.finished.get(reason, 0) for reason in _FINISHED}
    measures = {name: counts[name] for name in MEASURES}
    cancels = {stage: told.cancels.get(stage, 0) for stage in STAGES}
    yield counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", cache.queries)
    yield counter("vllm:prefix_cache_hits", "Prompt tokens found.", cache.hits)
    yield counter("vllm:num_preemptions", "Rows that gave up their memory.", counts["preemptions"])
    yield counter("vllm:prompt_tokens", "Prompt tokens, cached ones too.", counts["prompt_tokens"])
    yield counter("vllm:generation_tokens", "Generated tokens.", counts["generated_tokens"])
    yield counter("vllm:request_success", "Choices that ended.", finished, "finished_reason")
    yield counter("penstock_prefilled_tokens", "Prompt tokens computed.", counts["prefilled_tokens"])
    yield counter("penstock_cache_evicted_bytes", "Left the prompt cache.", cache.evicted, "reason")
    yield counter("penstock_measures", "For memory, or after an error.", measures, "measure")
    yield counter("penstock_engine_deaths", "Engines that died.", counts["engine_deaths"])
    yield counter("penstock_continuations", "Choices carried to a new engine.", counts["continuations"])
    yield counter("penstock_audit_repairs", "Of the engine's books.", counts["audit_repairs"])
    yield counter("penstock_cancels", "Clients gone, and cancelled.", cancels, "stage")
    yield counter("penstock_errors", "Answers that were errors.", told.errors, "kind")


def _family(family: Any, model: str, name: str, words: str, value: Any, label: str = "") -> Metric:
    """`value`: a number; with a label, numbers by its values; None: not known now, so there is no sample."""
    made: Metric = family(name, words, labels=["model_name", label] if label else ["model_name"])
    values = value if isinstance(value, Mapping) else {} if value is None else {"": value}
    for of, number in values.items():
        made.add_metric([model, of] if label else [model], number)  # type: ignore[attr-defined]
    return made


def _histogram(model: str, name: str, words: str, seen: Histogram) -> Metric:
    made = HistogramMetricFamily(name, words, labels=["model_name"])
    bounds = [*map(str, map(float, seen.bounds)), "+Inf"]
    made.add_metric([model], list(zip(bounds, accumulate(seen.counts), strict=True)), seen.sum)
    return made


async def scraped(service: Service, exchange: Exchange) -> None:
    """GET /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service))
    await exchange.respond(200, generate_latest(registry), media=CONTENT_TYPE_PLAIN_0_0_4.encode())
