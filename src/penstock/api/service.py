"""What the handlers work with: the backend, the model's text parts, the names served, and the limits.

Assembled by the front. Invariant: a handler sees text parts only after `wait_ready`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from penstock import wire
from penstock.api.admission import Admission
from penstock.errors import PenstockError
from penstock.supervisor.observer import Observer
from penstock.supervisor.ticket import Job, Ticket
from penstock.text.parts import TextParts

if TYPE_CHECKING:
    from penstock.api.exchange import Exchange
    from penstock.api.generation import Generation


class Backend(Protocol):
    """What `api` needs of `supervisor.backend.Backend`."""

    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str | None: ...

    ready: wire.Ready | None
    status: wire.Status | None
    observer: Observer

    async def wait_ready(self) -> wire.Ready: ...
    def open(self, job: Job) -> Ticket: ...
    def snapshot(self) -> dict[str, Any]: ...
    def clear_cache(self) -> bool: ...


@dataclass(frozen=True)
class Timing:
    """Patience, in seconds; tests inject short ones."""

    keepalive: float = 10.0
    body: float = 60.0
    stalled_reader: float = 300.0


@dataclass
class Service:
    """Everything a handler may use. The text parts arrive when the model's files are read."""

    backend: Backend
    model_name: str
    served_names: list[str]
    pool: Executor
    admission: Admission
    created: int = field(default_factory=lambda: int(time.time()))
    timing: Timing = Timing()
    strict_model_names: bool = False
    defaults: Mapping[str, float | None] = field(default_factory=dict)
    """Values of the command line, by request field; None where not set."""
    requests: dict[str, tuple[Exchange, Generation]] = field(default_factory=dict)
    """Those that are with the engine, by the ids of their exchanges."""
    errors: Counter[str] = field(default_factory=Counter)
    """Answers that were errors, by label."""
    _text: TextParts | None = None
    _text_set: asyncio.Event = field(default_factory=asyncio.Event)

    def set_text(self, text: TextParts) -> None:
        """The model's files are read; requests that wait go on. On the event loop's thread."""
        self._text = text
        self._text_set.set()

    def failed(self, error: PenstockError) -> None:
        """A client is being told this."""
        self.errors[error.kind.label] += 1
        self.backend.observer.events.failed(error)

    @property
    def has_text(self) -> bool:
        """The text parts are there."""
        return self._text is not None

    async def wait_ready(self) -> tuple[wire.Ready, TextParts]:
        """Waits while the model loads. Raises ENGINE_HALTED, SHUTTING_DOWN."""
        return await self.backend.wait_ready(), await self.wait_text()

    async def wait_text(self) -> TextParts:
        """Waits while the model's files are read. Raises as `wait_ready`, if they never will be."""
        if self._text is None:
            await self.backend.wait_ready()
        await self._text_set.wait()
        assert self._text is not None
        return self._text
