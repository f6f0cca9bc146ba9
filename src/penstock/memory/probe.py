"""What the machine says of its memory: the one place that asks the operating system.

`Machine` holds what does not change (limits), `Reading` what does (free bytes, pressure, our footprint). Both
come from a `Probe`, so that a test or `penstock plan` can be any Mac. The device's own facts come from the
engine, because the front never loads MLX; on Darwin 'free' bytes mislead, so there the kernel's pressure
level and our own footprint count. Invariant: a fact that cannot be read is None, never a guess.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import re
import resource
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from penstock.sizes import parse_size

PRETEND = "PENSTOCK_PRETEND"
"""The variable that makes the whole server believe in another machine: for tests, and to try things out."""
MiB = 1 << 20
GiB = 1 << 30


class Pressure(IntEnum):
    """The system's memory pressure, in the three levels of macOS."""

    NORMAL = 1
    WARN = 2
    CRITICAL = 4


@dataclass(frozen=True, slots=True)
class Machine:
    """Limits in bytes, fixed for the life of a process. None: no such limit, or not to be known."""

    physical: int | None = None
    cgroup: int | None = None
    rlimit: int | None = None
    """The tighter of RLIMIT_DATA and RLIMIT_AS."""
    device: int | None = None
    """A pretended device's limit, in place of the one that the engine finds."""
    wired: int | None = None
    """macOS: what `iogpu.wired_limit_mb` lets the GPU hold; None: it is not set, the system decides."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The moment's facts, in bytes."""

    available: int | None = None
    pressure: Pressure = Pressure.NORMAL
    footprint: int | None = None
    """What the system charges to the process asked about."""
    private: int | None = None
    """Linux: what RLIMIT_DATA counts of that process (heap, stacks, anonymous maps)."""


class Probe(Protocol):
    """Where memory facts come from."""

    def machine(self) -> Machine: ...
    def read(self, pid: int) -> Reading: ...


@dataclass(frozen=True, slots=True)
class Pretended:
    """A machine and a moment as told: for tests and for planning for another machine."""

    of: Machine
    now: Reading = Reading()
    processes: Probe | None = None
    """Where the facts about processes come from, if they are to be true."""

    def machine(self) -> Machine:
        """As told."""
        return self.of

    def read(self, pid: int) -> Reading:
        """As told, but for what is known of the process."""
        if self.processes is None:
            return self.now
        true = self.processes.read(pid)
        return replace(self.now, footprint=true.footprint, private=true.private)


class LinuxProbe:
    """Files of /proc and /sys. `root` lets a test lay out its own."""

    STALL_WARN, STALL_CRITICAL = 10.0, 40.0
    """Per cent of the last ten seconds in which some (all) tasks stalled on memory."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def machine(self) -> Machine:
        """The limits that hold for this process and its children."""
        limits = [limit for limit, _ in self._cgroups()]
        return Machine(self._kilobytes("proc/meminfo").get("MemTotal"), min(limits, default=None), _rlimit())

    def read(self, pid: int) -> Reading:
        """MemAvailable within the cgroup's room, PSI, and VmRSS + VmSwap of `pid`."""
        free = [max(0, limit - usage) for limit, usage in self._cgroups() if usage is not None]
        memory, status = self._kilobytes("proc/meminfo"), self._kilobytes(f"proc/{pid}/status")
        if "MemAvailable" in memory:
            free.append(memory["MemAvailable"])
        footprint = status["VmRSS"] + status.get("VmSwap", 0) if "VmRSS" in status else None
        return Reading(min(free, default=None), self._pressure(), footprint, status.get("VmData"))

    def _pressure(self) -> Pressure:
        told = self._text("proc/pressure/memory")
        shares = {kind: float(share) for kind, share in re.findall(r"(some|full) avg10=([\d.]+)", told)}
        if shares.get("full", 0.0) >= self.STALL_CRITICAL:
            return Pressure.CRITICAL
        return Pressure.WARN if shares.get("some", 0.0) >= self.STALL_WARN else Pressure.NORMAL

    def _cgroups(self) -> list[tuple[int, int | None]]:
        """(limit, usage) of each cgroup with a limit, from the process's own up."""
        found = []
        for line in self._text("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                base, names = "sys/fs/cgroup", ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                base, names = "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts), -1, -1):
                place = "/".join((base, *parts[:depth]))
                limit, usage = (self._number(f"{place}/{name}") for name in names)
                if limit is not None and limit < 1 << 60:  # v1 says 'no limit' by a number near 2^63
                    # What was read from files, weights too, counts as used until somebody needs the room.
                    told = self._text(f"{place}/memory.stat")
                    files = re.findall(r"^(?:total_)?inactive_file (\d+)$", told, re.MULTILINE)
                    found.append((limit, usage and max(0, usage - int(files[-1] if files else 0))))
        return found

    def _text(self, path: str) -> str:
        try:
            return (self.root / path).read_text()
        except OSError:
            return ""

    def _number(self, path: str) -> int | None:
        text = self._text(path).strip()
        return int(text) if text.isdigit() else None

    def _kilobytes(self, path: str) -> dict[str, int]:
        """A file's lines such as 'MemTotal:  24 kB', in bytes."""
        lines = re.findall(r"^(\w+):\s+(\d+) kB$", self._text(path), re.MULTILINE)
        return {name: int(size) * 1024 for name, size in lines}


class DarwinProbe:
    """sysctl and proc_pid_rusage, both unprivileged; the calls are injected, so that tests can be a Mac."""

    FOOTPRINT_OFFSET = 72
    """Of ri_phys_footprint in rusage_info_v4 (sys/resource.h): after a uuid and seven 64-bit fields."""

    def __init__(self, system: _Darwin | None = None) -> None:
        self.system = system or _Darwin()

    def machine(self) -> Machine:
        """hw.memsize and the GPU's wired limit; no cgroups, and macOS does not enforce RLIMIT_DATA."""
        wired = self.system.integer("iogpu.wired_limit_mb")
        return Machine(self.system.integer("hw.memsize"), wired=wired * MiB if wired else None)

    def read(self, pid: int) -> Reading:
        """The kernel's pressure level and the process's phys_footprint, which counts Metal's buffers."""
        level, usage = self.system.integer("kern.memorystatus_vm_pressure_level"), self.system.rusage(pid)
        pressure = Pressure(level) if level in tuple(Pressure) else Pressure.NORMAL
        footprint = None if usage is None else struct.unpack_from("=Q", usage, self.FOOTPRINT_OFFSET)[0]
        return Reading(None, pressure, footprint)


class _Darwin:
    """The two calls of libSystem that the probe needs."""

    RUSAGE_INFO_V4 = 4

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(ctypes.util.find_library("System"), use_errno=True)

    def integer(self, name: str) -> int | None:
        value = ctypes.c_uint64(0)
        size = ctypes.c_size_t(ctypes.sizeof(value))
        failed = self.lib.sysctlbyname(
            name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
        )
        return None if failed else value.value

    def rusage(self, pid: int) -> bytes | None:
        buffer = ctypes.create_string_buffer(512)
        return None if self.lib.proc_pid_rusage(pid, self.RUSAGE_INFO_V4, buffer) else buffer.raw


def system_probe(environment: Mapping[str, str] | None = None) -> Probe:
    """The probe of the machine we run on, or of the one that PENSTOCK_PRETEND describes.

    That variable is a JSON object with any of physical, cgroup, rlimit, device, wired, available: bytes or
    sizes such as "48G". Limits it does not name are none. Raises ValueError, with a sentence, for the rest.
    """
    real: Probe = DarwinProbe() if os.uname().sysname == "Darwin" else LinuxProbe()
    told = (os.environ if environment is None else environment).get(PRETEND)
    if not told:
        return real
    try:
        limits = {name: parse_size(str(size)) for name, size in json.loads(told).items()}
        now = Reading(limits.pop("available", None))
        return Pretended(Machine(**limits), now, real)
    except (ValueError, TypeError, AttributeError):
        known = "physical, cgroup, rlimit, device, wired and available"
        raise ValueError(f"{PRETEND} must be a JSON object of sizes, named {known}, not {told!r}") from None


def _rlimit() -> int | None:
    limits = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return min((n for n in limits if n != resource.RLIM_INFINITY), default=None)
