"""The front: one asyncio process that owns the port, the text of the model, and the engine's life.

Puts the parts together and takes them apart again. The port answers (with 503 `loading`) before anything
is read or downloaded; the first SIGINT or SIGTERM drains, the second exits at once. Never imports MLX.
Invariant: when `run` returns, the port is closed and no engine is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import uvicorn

from penstock import log, models, platform, wire
from penstock.api.admission import Admission
from penstock.api.app import create_app
from penstock.api.protocol import BoundedProtocol, Bounds, room_for_connections
from penstock.api.service import Service
from penstock.config import Options
from penstock.errors import PenstockError
from penstock.memory.probe import system_probe
from penstock.supervisor.backend import Backend
from penstock.supervisor.idle import Idle
from penstock.supervisor.queue import QueueLimits
from penstock.supervisor.warden import Warden
from penstock.text.errors import ModelFilesError
from penstock.text.parts import TextParts

EXIT_USER, EXIT_RESTART, EXIT_NOW = 2, 1, 130
POOL_THREADS = 2
CLOSE_SECONDS = 2.0
"""What connections get to end by themselves after the drain."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the front has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(options: Options) -> int:
    """Serve until told to stop. Returns the process's exit code."""
    try:
        listener = platform.listen(options.host, options.port)
    except platform.PortProblem as problem:
        log.logger.error(str(problem))
        return problem.exit_code
    with listener:
        return asyncio.run(_Front(options).serve(listener))


class _Front:
    """One run of the server."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.began = time.monotonic()
        self.exit_code = 0
        self.stopping = False
        self.backend = Backend(
            warden=Warden(system_probe(), options.memory_limit),
            queue=QueueLimits(options.max_queue, options.max_queue_tokens, options.max_wait),
            idle=Idle(options.idle_release, options.idle_unload),
        )
        name = options.served_model_name[0] if options.served_model_name else _name(options)
        self.service = Service(
            backend=self.backend,
            model_name=name,
            served_names=list(options.served_model_name) or [name],
            pool=ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="text"),
            admission=Admission(options.front_memory),
            strict_model_names=options.strict_model_names,
            defaults={
                "temperature": options.temp,
                "top_p": options.top_p,
                "top_k": options.top_k,
                "min_p": options.min_p,
                "max_tokens": options.max_tokens,
            },
        )

    async def serve(self, listener: socket.socket) -> int:
        config = uvicorn.Config(
            create_app(self.service, self.options),
            http=partial(BoundedProtocol, bounds=room_for_connections(Bounds())),  # type: ignore[arg-type]
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(CLOSE_SECONDS),
        )
        server = _Server(config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop_asked, server)
        host, port = listener.getsockname()[:2]
        log.start_line(f"listening on {log.base_url(host, port)}, loading {self.service.model_name}")
        start = asyncio.create_task(self._start(server, host, port))
        await server.serve(sockets=[listener])
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        await self.backend.stop(0.0)
        self.service.pool.shutdown(wait=False, cancel_futures=True)
        return self.exit_code

    async def _start(self, server: _Server, host: str, port: int) -> None:
        try:
            path = await asyncio.to_thread(_resolve, self.options)
            text = await asyncio.to_thread(_text, path, self.options)
            engine_options = _engine_options(path, text, self.options)
        except Exception as problem:  # a model's files may hold anything
            known = isinstance(problem, (models.ModelProblem, ModelFilesError))
            why = f"The model's files can't be read: {type(problem).__name__}: {problem}"
            log.logger.error(str(problem) if known else why)
            self.exit_code = getattr(problem, "exit_code", EXIT_USER)
            server.should_exit = True
            return
        self.service.set_text(text)
        gc.collect()
        gc.freeze()  # the tokenizer's tables live as long as the process
        self.backend.start(engine_options)
        try:
            ready = await self.backend.wait_ready()
        except PenstockError:
            if self.backend.state == "halted":
                log.logger.error(f"the model cannot be served: {self.backend.reason}")
                self.exit_code = EXIT_USER
                server.should_exit = True
            return
        self._say_ready(ready, host, port)

    def _say_ready(self, ready: wire.Ready, host: str, port: int) -> None:
        log.say(
            log.banner(
                ready,
                model=self.service.model_name,
                url=log.base_url(host, port),
                seconds=time.monotonic() - self.began,
                demo=self.options.demo,
                keyed=bool(self.options.api_key),
            )
        )
        if ready.batch_mode != "ragged":
            log.logger.warning(f"rows are computed one by one, which is slower: {ready.batch_reason}")

    def _stop_asked(self, server: _Server) -> None:
        if self.stopping:
            log.logger.warning("stopped at once")
            os._exit(EXIT_NOW)
        self.stopping = True
        log.start_line(
            f"stopping: open requests have {self.options.drain_timeout:.0f} s; again to stop at once"
        )
        self.drain = asyncio.create_task(self._drain(server))

    async def _drain(self, server: _Server) -> None:
        await self.backend.stop(self.options.drain_timeout)
        server.should_exit = True


def _name(options: Options) -> str:
    if options.demo:
        return "penstock-demo"
    assert options.model is not None
    return Path(options.model).name if Path(options.model).is_dir() else options.model


def _resolve(options: Options) -> Path:
    if options.demo:
        return models.DEMO
    assert options.model is not None
    return models.resolve(options.model, trust_remote_code=options.trust_remote_code)


def _text(path: Path, options: Options) -> TextParts:
    return TextParts.load(
        path,
        chat_template=options.chat_template or None,
        use_default_chat_template=options.use_default_chat_template,
        chat_template_args=dict(options.chat_template_args),
    )


def _engine_options(path: Path, text: TextParts, options: Options) -> wire.EngineOptions:
    newline = text.tokenizer.encode("\n", add_special_tokens=False)
    return wire.EngineOptions(
        model_path=str(path),
        trust_remote_code=options.trust_remote_code,
        decode_concurrency=options.decode_concurrency,
        prompt_concurrency=options.prompt_concurrency,
        prefill_step_size=options.prefill_step_size,
        stall_target_ms=options.stall_target_ms,
        prompt_cache_bytes=options.prompt_cache_bytes,
        prompt_cache_size=options.prompt_cache_size,
        hard_memory_limit=options.hard_memory_limit,
        wire_weights=options.wire_weights,
        xtc_special=(*newline, *sorted(text.tokenizer.eos_ids)),
    )
