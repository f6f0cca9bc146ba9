"""One engine as the backend sees it: process, channel, the watch over it, and what is known of its end."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from penstock.supervisor import machine
from penstock.supervisor.channel import FrontChannel
from penstock.supervisor.process import EngineProcess

if TYPE_CHECKING:
    from penstock.supervisor.backend import Backend


class Engine:
    """Dead when it has been reaped (`code`) and all it had sent was read (`closed`).

    `verdict`: why the front itself ended it.
    """

    def __init__(self, backend: Backend, epoch: int, limits: machine.HangLimits) -> None:
        self.epoch = epoch
        self.code: int | None = None
        self.closed = False
        self.verdict: str | None = None
        self.process = EngineProcess(
            backend.command, epoch, lambda code: backend._exited(self, code), backend.environment
        )
        self.watch = machine.Watch(limits, monotonic())
        self.channel = FrontChannel(
            lambda message: backend._message(self, message),
            lambda error: backend._closed(self, error),
            backend._flush,
        )

    def facts(self) -> dict[str, Any]:
        """What it is doing, from its page, for /health."""
        view = self.process.page.read()
        return {
            "pid": self.process.pid,
            "epoch": self.epoch,
            "phase": view.phase.name.lower(),
            "steps": view.steps,
            "rows": len(view.rows),
        }
