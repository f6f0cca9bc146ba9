"""How many bytes the engine may hold: the ceiling, fixed at start, and the budget, which follows the system.

    ceiling = the smallest of what was asked for, the device's limit, cgroup, rlimit and physical memory,
              each less what must stay free of it
    budget  ≤ ceiling: falls at once when the system runs short, rises slowly when it has room again

The front owns the budget and sends it to the engine. Pure: facts in, bytes out. On macOS the kernel's
pressure level and our footprint decide, on Linux the bytes still available too. A fall never goes below
`floor` (weights and the oldest row), because stopping that row would not help anybody.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.memory.probe import GiB, Machine, MiB, Pressure, Reading

RESERVE, RESERVE_SHARE = 2 * GiB, 0.08
"""What stays free of a limit that nobody chose for us: for the system and for what MLX does not count."""
SMALL_SHARE = 0.25
"""The reserve is at most this share of a limit, so that a small machine keeps something."""
OVERHEAD, OVERHEAD_SHARE = 64 * MiB, 0.06
"""Of a limit on processes: what it counts besides MLX's own count (fragments of the heap, stacks, Python)."""
RISE_SHARE, RISE_SECONDS = 0.05, 10.0
"""The budget rises by this share of the ceiling in this time; under a mere warning it falls so fast."""
WARN_KEEPS = 0.5
"""What a warning never takes of the bytes above `floor`. With a large model on a Mac it may last for hours,
and an engine without a cache computes all prompts again."""
CRITICAL_SHARE = 0.80
"""Of our own footprint: where the budget goes at once under critical pressure."""
KEEP_AVAILABLE = 512 * MiB
"""Bytes that are left to the rest of a Linux system before the budget falls."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The most bytes that the engine may ever hold, and which limit says so."""

    size: int
    decided_by: str


def ceiling(machine: Machine, *, device: int | None, asked: int | None, used: int) -> Ceiling:
    """The ceiling at the engine's start.

    `device`: Metal's recommended working set, or the bytes free on a CUDA device; `asked`: --memory-limit;
    `used`: bytes that the engine's process holds before the model is loaded, which limits on processes
    count and MLX does not. Raises ValueError if nothing is known, which no supported system brings about.
    """
    found: list[Ceiling] = []
    if asked is not None:
        found.append(Ceiling(asked, "--memory-limit"))
    for limit, name in ((machine.cgroup, "the cgroup's limit"), (machine.rlimit, "the process's rlimit")):
        if limit is not None:
            found.append(Ceiling(int(limit - max(OVERHEAD, limit * OVERHEAD_SHARE)) - used, name))
    for limit, name in ((device, "the device's limit"), (machine.physical, "physical memory")):
        if limit is not None:
            reserve = (
                0 if asked is not None else min(max(RESERVE, limit * RESERVE_SHARE), limit * SMALL_SHARE)
            )
            found.append(Ceiling(int(limit - reserve), name))
    if not found:
        raise ValueError("no memory limit is known, not even the machine's size; set --memory-limit")
    return min((Ceiling(max(0, c.size), c.decided_by) for c in found), key=lambda c: c.size)


class Governor:
    """The budget over time. `update` is called about once a second with a fresh reading."""

    def __init__(self, limit: Ceiling, now: float) -> None:
        self.limit = limit
        self.budget = limit.size
        self.decided_by = limit.decided_by
        self._at = now

    def update(self, reading: Reading, floor: int, now: float) -> int:
        """The budget in force from now on, in bytes; never above the ceiling, never below `floor`."""
        target, why = self.limit.size, self.limit.decided_by
        floor = min(floor, target)
        elapsed, self._at = max(0.0, now - self._at), now
        step = max(1, int(self.limit.size * RISE_SHARE * elapsed / RISE_SECONDS))
        footprint = reading.footprint
        if footprint is not None:
            if reading.pressure is Pressure.CRITICAL:
                target, why = min(target, int(footprint * CRITICAL_SHARE)), "critical memory pressure"
            elif reading.pressure is Pressure.WARN:
                kept = floor + int((self.limit.size - floor) * WARN_KEEPS)
                target, why = max(min(footprint, self.budget) - step, kept), "memory pressure"
            if reading.available is not None:
                reachable = footprint + reading.available - KEEP_AVAILABLE
                if reachable < target:
                    target, why = reachable, "memory available on this machine"
        if target > self.budget:
            target = min(target, self.budget + step)
        target = max(target, floor)
        if target != self.budget:
            self.decided_by = why
        self.budget = target
        return target
