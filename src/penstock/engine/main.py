"""The engine's start: take over the descriptors, load and probe the model, say what it is, run the loop.

Exit codes: 0 when the front said so or is gone, 3 when the model cannot be served (a `Halt` has said why).
Anything else is a death, which the supervisor answers with a restart.
"""

from __future__ import annotations

import faulthandler
import logging
import platform
import sys
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from penstock import wire
from penstock.engine import loader, probe
from penstock.engine.batch import Runner
from penstock.engine.loop import Loop
from penstock.engine.scheduler import Facts
from penstock.page import Page, Phase
from penstock.pipe import EngineChannel, FrontGone, adopt

log = logging.getLogger("penstock.engine")

EXIT_HALTED = 3
POOL_LIMIT = 1 << 30
"""Bytes that MLX's allocator may keep of freed buffers; its own default is nearly all of the memory."""


def main() -> int:
    """Run the engine process to its end."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    channel, page = adopt(sys.argv[1:])
    try:
        options = _await_start(channel)
        page.begin(Phase.LOADING)
        loop = _prepare(options, channel, page)
    except FrontGone:
        return 0
    except loader.LoadError as problem:
        channel.send(wire.Halt(str(problem)))
        channel.flush(5.0)
        return EXIT_HALTED
    loop.run()
    channel.flush(1.0)
    return 0


def _await_start(channel: EngineChannel) -> wire.EngineOptions:
    while True:
        for message in channel.receive(None):
            if isinstance(message, wire.Start):
                return message.options


def _prepare(options: wire.EngineOptions, channel: EngineChannel, page: Page) -> Loop:
    mx.set_cache_limit(POOL_LIMIT)
    channel.send(wire.Loading("weights"))
    loaded = loader.load(options.model_path, trust_remote_code=options.trust_remote_code)
    channel.send(wire.Loading("probe"))
    page.begin(Phase.PROBE)
    found = probe.probe(loaded.model, forced=options.batch_mode)
    runner = Runner(loaded.model, mode=found.mode, reason=found.reason)
    mx.clear_cache()
    facts = loaded.facts
    channel.send(
        wire.Ready(
            model_type=facts.model_type,
            context_length=facts.context_length,
            eos_ids=sorted(facts.eos_ids),
            vocab_size=facts.vocab_size,
            backend=_backend(),
            device=_device(),
            batch_mode=found.mode,
            batch_reason=found.reason,
            weights_bytes=facts.weights_bytes,
            kv_bytes_per_token=facts.kv_bytes_per_token,
            state_bytes=facts.state_bytes,
            versions={name: version(name) for name in ("mlx", "mlx-lm")},
        )
    )
    return Loop(
        runner,
        channel,
        page,
        Facts(
            decode_concurrency=options.decode_concurrency,
            prompt_concurrency=options.prompt_concurrency,
            chunk_longest=options.prefill_step_size,
            stall_target=options.stall_target_ms / 1000,
        ),
        context_length=facts.context_length,
        eos_ids=frozenset(facts.eos_ids),
        vocab_size=facts.vocab_size,
        xtc_special=options.xtc_special,
        pipelined=found.pipelined,
    )


def _backend() -> str:
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.default_device() == mx.Device(mx.gpu, 0) else "cpu"


def _device() -> str:
    info: dict[str, Any] = mx.device_info()
    return str(info.get("device_name") or platform.machine())
