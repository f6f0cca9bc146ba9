"""A backend that plays scripted ids, and a small real tokenizer and template to read them with.

The tokenizer knows the 256 bytes (ids 0–255, in byte order) and the special tokens below. A script is a
function of the job; it drives the real Ticket the way the supervisor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from array import array
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import tokenizers
import uvicorn

from penstock import wire
from penstock.api.admission import Admission
from penstock.api.app import create_app
from penstock.api.protocol import BoundedProtocol, Bounds
from penstock.api.service import Service, Timing
from penstock.config import Options
from penstock.errors import Kind, PenstockError
from penstock.memory.probe import system_probe
from penstock.supervisor.journal import Journal
from penstock.supervisor.observer import Observer
from penstock.supervisor.ticket import Job, Ticket
from penstock.supervisor.warden import Warden
from penstock.text.formats import infer
from penstock.text.parts import TextParts
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

EOS, BOS = "<|im_end|>", "<|start|>"
SPECIALS = [EOS, BOS, "<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
BLOB = "blob" * 1000
"""A word of the vocabulary that is long, for answers that outrun their reader."""
VOCAB = 256 + len(SPECIALS) + 1
EOS_ID, BOS_ID, BLOB_ID = 256, 257, VOCAB - 1
CONTEXT = 4096
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "<|im_start|>assistant\n{% if thinking %}<think>\n{% endif %}"
)


def _byte_letters() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(hidden)) for byte in range(256)]


def text_parts(*, bos: bool = True, eos: bool = True, generation: dict[str, Any] | None = None) -> TextParts:
    """A byte tokenizer with ChatML, think and tool marks."""
    vocab = {letter: id for id, letter in enumerate(_byte_letters())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS[:3])
    backend.add_tokens([tokenizers.AddedToken(token, special=False) for token in (*SPECIALS[3:], BLOB)])
    config = {"bos_token": BOS} if bos else {}
    tokenizer = Tokenizer(backend, config, frozenset([EOS_ID] if eos else []))
    reasoning, tools = infer(tokenizer, TEMPLATE)
    return TextParts(tokenizer, ChatTemplate({"default": TEMPLATE}), reasoning, tools, generation or {})


READY = wire.Ready(
    model_type="fake",
    context_length=CONTEXT,
    eos_ids=[EOS_ID],
    vocab_size=VOCAB,
    backend="cpu",
    device="fake",
    batch_mode="ragged",
    batch_reason="scripted",
    weights_bytes=1,
    kv_bytes_per_token=1,
    state_bytes=0,
    versions={},
)

Script = Callable[["Run"], Awaitable[None]]


@dataclass
class Run:
    """One open job, as a script sees it."""

    job: Job
    ticket: Ticket
    ended: dict[int, int | None] = field(default_factory=dict)
    """Choice → the `keep` it was ended with; None: closed."""

    def put(self, choice: int, ids: list[int]) -> None:
        """New ids, with made-up log-probabilities where the job asks for them."""
        asked = self.job.sampling.logprobs
        logprobs = None if asked is None else [-0.5] * len(ids)
        top = None if not asked else [[(id, -0.5), (ord("z"), -2.0)][:asked] for id in ids]
        self.ticket.put_tokens(choice, ids, logprobs, top)


def say(
    *parts: str | bytes | list[int], reason: str = "stop", pause: float = 0.0, forever: bool = False
) -> Script:
    """A script: each part is one event (bytes one by one would be lists), the same for every choice."""

    async def script(run: Run) -> None:
        run.ticket.put_progress(0, len(run.job.prompt) // 2, len(run.job.prompt))
        await asyncio.sleep(0)
        cap = run.job.max_tokens
        sent = [0] * run.job.n
        for part in itertools.cycle(parts) if forever else parts:
            ids = part if isinstance(part, list) else list(part.encode() if isinstance(part, str) else part)
            for choice in range(run.job.n):
                room = len(ids) if cap is None else cap - sent[choice]
                if choice not in run.ended and room > 0:
                    run.put(choice, ids[:room])
                    sent[choice] += len(ids[:room])
            if len(run.ended) == run.job.n:
                return
            await asyncio.sleep(pause)
        for choice in range(run.job.n):
            if choice not in run.ended:
                full = cap is not None and sent[choice] >= cap
                if reason == "stop" and not full:
                    run.put(choice, [EOS_ID])
                run.ended[choice] = None
                run.ticket.put_finished(choice, "length" if full else reason, sent[choice])

    return script


def fail(kind: Kind, message: str, after: str = "") -> Script:
    """A script that fails, perhaps after some text."""

    async def script(run: Run) -> None:
        if after:
            run.put(0, list(after.encode()))
            await asyncio.sleep(0.01)
        run.ticket.put_failure(0, PenstockError(kind, message))

    return script


class FakeBackend:
    """Plays `script` for every job; `runs` are all jobs so far."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or say("Hello", " world")
        self.ready: wire.Ready | None = READY
        self.state = "ready"
        self.reason: str | None = None
        self.status: wire.Status | None = None
        self.journal, self.warden, self.deaths = Journal(), Warden(system_probe()), 0
        self.observer = Observer(self)  # type: ignore[arg-type]
        self.runs: list[Run] = []
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def wait_ready(self) -> wire.Ready:
        while self.ready is None:
            if self.state == "halted":
                raise PenstockError(Kind.ENGINE_HALTED, f"The model cannot be served: {self.reason}")
            await self._changed.wait()
        return self.ready

    def become(self, state: str, reason: str | None = None) -> None:
        """On the server's loop."""
        self.state, self.reason = state, reason
        self.ready = READY if state == "ready" else None
        self._changed.set()
        self._changed = asyncio.Event()

    def open(self, job: Job) -> Ticket:
        run: Run

        def end(id: int, keep: int | None) -> None:
            if id not in run.ended:
                run.ended[id] = keep
                run.ticket.put_finished(id, "cut", 0)

        run = Run(job, Ticket(job, list(range(job.n)), end))
        self.runs.append(run)
        task = asyncio.get_running_loop().create_task(self.script(run))  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run.ticket

    def snapshot(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "reason": self.reason,
            "stage": "",
            "engine": None,
            "given_back": {},
        }

    def clear_cache(self) -> bool:
        return False


class Server:
    """The real application behind uvicorn, on a thread and a free port of its own."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        options: Options | None = None,
        timing: Timing | None = None,
        text: TextParts | None = None,
        front_memory: int = 1_000_000_000,
        defaults: dict[str, float | None] | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        options = options or Options(port=0)
        self.backend = FakeBackend(script)
        self.pool = ThreadPoolExecutor(2)
        self.service = Service(
            backend=self.backend,
            model_name="org/fake",
            served_names=["org/fake", "alias"],
            pool=self.pool,
            admission=Admission(front_memory),
            timing=timing or Timing(),
            strict_model_names=options.strict_model_names,
            defaults=defaults or {},
        )
        self.service.set_text(text or text_parts())
        config = uvicorn.Config(
            create_app(self.service, options),
            port=0,
            http=partial(BoundedProtocol, bounds=bounds),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
        )
        self.server = uvicorn.Server(config)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve()

        asyncio.run(main())

    def start(self) -> Server:
        self._thread.start()
        while not self.server.started:
            self._thread.join(0.005)
            assert self._thread.is_alive()
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def on_loop(self, action: Callable[[], Any]) -> Any:
        """Run `action` on the server's loop and return what it returns."""

        async def call() -> Any:
            return action()

        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(5)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        self.pool.shutdown()

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10, verify=False, trust_env=False, **options)


@contextlib.contextmanager
def serving(script: Script | None = None, **options: Any) -> Iterator[Server]:
    """A running server; afterwards nothing of any request may be left."""
    server = Server(script, **options).start()
    try:
        yield server
        server.on_loop(lambda: None)
        wait_until(lambda: server.service.admission.open == 0)
        assert server.service.admission.held == 0
        assert all(run.ticket.closed for run in server.backend.runs)
    finally:
        server.stop()


def wait_until(condition: Callable[[], bool], tries: int = 2000) -> None:
    """Until it holds; an AssertionError if it doesn't for long."""
    pause = threading.Event()
    for _ in range(tries):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("what was waited for did not come about")


def ids_of(text: str) -> array[int]:
    """The ids of plain text."""
    return array("I", text.encode())
