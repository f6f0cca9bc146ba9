"""The engine's start: take over the descriptors, learn the budget, load, probe and calibrate, run the loop.

Exit codes: 0 when the front said so or is gone, 3 when the model cannot be served (a `Halt` has said why).
Anything else is a death, which the supervisor answers with a restart.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from penstock import weights, wire
from penstock.engine import calibrate, device, limits, loader, probe, profile
from penstock.engine.accounts import Accounts
from penstock.engine.batch import Runner
from penstock.engine.drawing import Drawing
from penstock.engine.grammar import Grammars
from penstock.engine.loop import Loop
from penstock.engine.prompt_cache import PromptCache
from penstock.engine.scheduler import Facts
from penstock.memory import estimate
from penstock.memory.costs import Costs, Fit
from penstock.memory.predict import Transient
from penstock.page import Page, Phase
from penstock.pipe import EngineChannel, FrontGone, adopt
from penstock.sizes import gigabytes

log = logging.getLogger("penstock.engine")

EXIT_HALTED = 3
M = TypeVar("M", bound=wire.ToEngine)


class Refused(Exception):
    """The model cannot be served here; the sentence says why."""


def main() -> int:
    """Run the engine process to its end."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s:%(message)s")
    channel, page = adopt(sys.argv[1:])
    try:
        options, inbox = _await(channel, wire.Start)
        page.begin(Phase.LOADING)
        channel.send(device.facts())
        budget, _ = _await(channel, wire.Budget, inbox)
        loop = _prepare(options.options, budget, channel, page)
    except FrontGone:
        return 0
    except (loader.LoadError, Refused) as problem:
        channel.send(wire.Halt(str(problem)))
        channel.flush(5.0)
        return EXIT_HALTED
    loop.run()
    channel.flush(1.0)
    return 0


def _await(
    channel: EngineChannel, kind: type[M], inbox: list[wire.ToEngine] | None = None
) -> tuple[M, list[wire.ToEngine]]:
    """The next message of `kind`, and what came behind it."""
    while True:
        messages = inbox or channel.receive(None)
        inbox = None
        for at, message in enumerate(messages):
            if isinstance(message, kind):
                return message, messages[at + 1 :]


def _prepare(options: wire.EngineOptions, budget: wire.Budget, channel: EngineChannel, page: Page) -> Loop:
    channel.send(wire.Loading("weights"))
    _refuse_weights(options.model_path, budget)
    loaded = loader.load(options.model_path, trust_remote_code=options.trust_remote_code, beat=page.beat)
    facts = loaded.facts
    channel.send(wire.Loading("probe"))
    page.begin(Phase.PROBE)
    room = budget.ceiling - facts.weights_bytes
    found = probe.probe(loaded.model, options.batch_mode, room)
    runner = Runner(loaded.model, mode=found.mode, reason=found.reason)
    costs = calibrate.costs_of(runner)
    transient = _transient(options, loaded, runner, found.pipelined, room, channel, page)
    mx.clear_cache()
    held = max(facts.weights_bytes + transient.constants, int(mx.get_active_memory()))
    longest = Fit(costs, transient).longest(budget.ceiling - held, facts.context_length)
    if longest == 0:
        raise Refused(
            f"the model's weights take {gigabytes(facts.weights_bytes)} and leave too little of "
            f"{gigabytes(budget.ceiling)} ({budget.decided_by}) to compute a single token"
        )
    accounts = Accounts(budget.ceiling, held, costs, limits.set_pool, mx.set_memory_limit)
    accounts.set_budget(budget.size)
    cache = PromptCache(
        runner, accounts, max_bytes=options.prompt_cache_bytes, max_entries=options.prompt_cache_size
    )
    if cache.obstacle:
        log.warning("the prompt cache is off: this model's %s can't be cut or kept exactly", cache.obstacle)
    if options.wire_weights:
        limits.wire_weights(held)
    if options.hard_memory_limit:
        limits.fence(budget.ceiling)
    channel.send(_ready(facts, found, costs, budget, longest))
    return Loop(
        runner,
        channel,
        page,
        Facts(
            decode_concurrency=options.decode_concurrency,
            prompt_concurrency=options.prompt_concurrency,
            chunk_longest=options.prefill_step_size,
            stall_target=options.stall_target_ms / 1000,
            costs=costs,
            transient=transient,
        ),
        accounts,
        cache,
        Grammars(accounts, Path(options.model_path), facts.vocab_size, facts.eos_ids),
        Drawing(facts.vocab_size, facts.eos_ids, options.xtc_special),
        context_length=facts.context_length,
        eos_ids=frozenset(facts.eos_ids),
        pipelined=found.pipelined,
    )


def _transient(
    options: wire.EngineOptions,
    loaded: loader.Loaded,
    runner: Runner,
    pipelined: bool,
    room: int,
    channel: EngineChannel,
    page: Page,
) -> Transient:
    """The predictor of this model here: as it was stored, or measured now and stored."""
    key = profile.fingerprint(loaded.config, runner.mode, pipelined, options.prefill_step_size, room)
    if (stored := profile.load(key)) is not None:
        return stored
    channel.send(wire.Loading("calibration"))
    page.beat()
    measured = calibrate.calibrate(
        runner,
        loaded.facts.vocab_size,
        room=room,
        context_length=loaded.facts.context_length,
        longest=options.prefill_step_size,
        pipelined=pipelined,
        per_score=_per_score(loaded),
        beat=page.beat,
    )
    constants = max(0, int(mx.get_active_memory()) - loaded.facts.weights_bytes)
    profile.save(key, measured := replace(measured, constants=constants))
    return measured


def _per_score(loaded: loader.Loaded) -> float:
    """What attention must be expected to hold of a (query, key) pair, in bytes; 0 with a fused kernel."""
    backend = device.backend()
    shape = estimate.Shape.of(loaded.config, loaded.facts.vocab_size, 4 if backend == "cpu" else 2)
    return estimate.per_score(shape, backend)


def _ready(
    facts: loader.ModelFacts, found: probe.Findings, costs: Costs, budget: wire.Budget, longest: int
) -> wire.Ready:
    return wire.Ready(
        model_type=facts.model_type,
        context_length=facts.context_length,
        eos_ids=sorted(facts.eos_ids),
        vocab_size=facts.vocab_size,
        backend=device.backend(),
        device=device.name(),
        batch_mode=found.mode,
        batch_reason=found.reason,
        weights_bytes=facts.weights_bytes,
        kv_bytes_per_token=costs.kv_per_token,
        state_bytes=costs.fixed,
        versions={name: version(name) for name in ("mlx", "mlx-lm")},
        longest=longest,
        ceiling=budget.ceiling,
        decided_by=budget.decided_by,
    )


def _refuse_weights(path: str, budget: wire.Budget) -> None:
    """Before anything is read into memory: weights that cannot fit would end in the system's own way."""
    try:
        size = weights.size(Path(path), widened=device.backend() == "cpu")
    except (weights.WeightsError, OSError) as error:
        raise Refused(str(error)) from None
    if size > budget.ceiling:
        raise Refused(
            f"the model's weights take {gigabytes(size)}, but only {gigabytes(budget.ceiling)} may be used "
            f"({budget.decided_by}); take a smaller or more strongly quantised model, or raise that limit"
        )
