"""Reads the machine's memory about once a second and tells the engine its budget.

Owns the governor of the present engine; a new engine gets a new one, since its device may have changed.
Invariant: an engine is told a budget before it loads anything.
"""

from __future__ import annotations

import os

from penstock import wire
from penstock.log import repeated
from penstock.memory.probe import Machine, Pressure, Probe, Reading
from penstock.sizes import gigabytes
from penstock.supervisor.budget import Governor, ceiling
from penstock.supervisor.notches import Notches

OUT_OF_MEMORY = "out_of_memory"
"""Name of the engine's count of errors that spoke of memory."""
NOTICEABLE = 0.01
"""Changes of the budget below this share of the ceiling are not worth a message while nobody waits."""


class Warden:
    """The budget's keeper on the front's side."""

    def __init__(self, probe: Probe, asked: int | None = None, notches: Notches | None = None) -> None:
        """`asked`: --memory-limit in bytes."""
        self.probe = probe
        self.asked = asked
        self.governor: Governor | None = None
        self.notches = notches or Notches()
        self._told = 0
        self._failed = 0

    @property
    def ceiling(self) -> int | None:
        """Bytes that the engine may ever hold; None before it has said what it computes on."""
        return None if self.governor is None else self.governor.limit.size

    def device(self, device: wire.Device, now: float) -> wire.Budget:
        """The first budget of a new engine: its ceiling, or less after deaths that looked like memory."""
        machine = self.probe.machine()
        if device.backend == "cuda":
            machine = Machine(device=machine.device)  # the host's limits do not hold for the device's memory
        limit = ceiling(machine, device=machine.device or device.limit, asked=self.asked, used=device.used)
        self.governor = Governor(limit, now)
        self._failed = 0
        self._told = self.notches.cap(limit.size)
        budget = self.budget
        assert budget is not None
        return budget

    def look(self, pid: int, status: wire.Status | None, now: float) -> wire.Budget | None:
        """Follow the system; a message if the budget has changed enough to tell.

        Rows on board are touched only at critical pressure, and then never the oldest.
        """
        if self.governor is None or status is None:
            return None
        reading = self.probe.read(pid)
        if status.device_free is not None:
            reading = Reading(status.device_free, footprint=status.device_held)
        floor = status.least if reading.pressure is Pressure.CRITICAL else status.floor
        failed = status.counts.get(OUT_OF_MEMORY, 0)
        if failed > self._failed:
            self._failed = failed
            self.notches.lower(now)
        self.notches.look(now)
        before = self.governor.budget
        budget = self.governor.update(reading, floor, now)
        if budget < before * (1 - NOTICEABLE):
            why = self.governor.decided_by
            repeated("budget", f"memory budget cut to {gigabytes(budget)}: {why}")
        limit = self.governor.limit.size
        budget = min(budget, max(self.notches.cap(limit), min(status.least, limit)))
        little = abs(budget - self._told) < limit * NOTICEABLE
        if budget == self._told or (little and budget != limit and not status.waiting):
            return None
        self._told = budget
        return self.budget

    def has_room(self, size: int) -> bool:
        """Whether the system could hold `size` bytes more now: a driver may lag behind a process's end.

        True where the system does not tell.
        """
        available = self.probe.read(os.getpid()).available
        if available is None or available >= size:
            return True
        repeated("room", f"{gigabytes(available)} are free, less than the model: its restart waits a little")
        return False

    @property
    def ceiling_decided_by(self) -> str:
        """Which limit is the smallest."""
        return "" if self.governor is None else self.governor.limit.decided_by

    @property
    def budget(self) -> wire.Budget | None:
        """As the engine was told it; None before it has said what it computes on."""
        if self.governor is None:
            return None
        limit = self.governor.limit
        why = self.governor.decided_by
        if self.notches.count and self._told < self.governor.budget:
            why = "an engine that ran out of memory"
        return wire.Budget(self._told, limit.size, why)
