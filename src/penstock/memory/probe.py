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
        return Machine(self._meminfo().get("MemTotal"), self._cgroup_limit(), _rlimit())

    def read(self, pid: int) -> Reading:
        """MemAvailable within the cgroup's room, PSI, and VmRSS + VmSwap of `pid`."""
        available = self._meminfo().get("MemAvailable")
        room = self._cgroup_room()
        if room is not None:
            available = room if available is None else min(available, room)
        status = _kilobyte_lines(self._text(f"proc/{pid}/status"))
        footprint = status["VmRSS"] + status.get("VmSwap", 0) if "VmRSS" in status else None
        return Reading(available, self._pressure(), footprint, status.get("VmData"))

    def _meminfo(self) -> dict[str, int]:
        return _kilobyte_lines(self._text("proc/meminfo"))

    def _pressure(self) -> Pressure:
        shares = {}
        for line in self._text("proc/pressure/memory").splitlines():
            kind, *pairs = line.split()
            shares[kind] = next((float(p[6:]) for p in pairs if p.startswith("avg10=")), 0.0)
        if shares.get("full", 0.0) >= self.STALL_CRITICAL:
            return Pressure.CRITICAL
        return Pressure.WARN if shares.get("some", 0.0) >= self.STALL_WARN else Pressure.NORMAL

    def _cgroups(self) -> list[tuple[Path, str, str]]:
        """(directory, limit's file, usage's file), from the process's own group up."""
        found = []
        for line in self._text("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory") and "memory" not in controllers.split(","):
                continue
            base = self.root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current")
            if controllers:
                base, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            parts = [p for p in path.split("/") if p not in ("", "..")]
            found += [(base.joinpath(*parts[:i]), *names) for i in range(len(parts), -1, -1)]
        return found

    def _cgroup_limit(self) -> int | None:
        limits = [self._number(where / limit) for where, limit, _ in self._cgroups()]
        # v1 says 'no limit' by a number near 2^63.
        return min((n for n in limits if n is not None and n < 1 << 60), default=None)

    def _cgroup_room(self) -> int | None:
        rooms = []
        for where, limit_name, usage_name in self._cgroups():
            limit, usage = self._number(where / limit_name), self._number(where / usage_name)
            if limit is not None and limit < 1 << 60 and usage is not None:
                rooms.append(max(0, limit - usage))
        return min(rooms, default=None)

    def _text(self, path: str) -> str:
        try:
            return (self.root / path).read_text()
        except OSError:
            return ""

    def _number(self, path: Path) -> int | None:
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            return None


class DarwinProbe:
    """sysctl and proc_pid_rusage, both unprivileged; the calls are injected, so that tests can be a Mac."""

    FOOTPRINT_OFFSET = 72
    """Of ri_phys_footprint in rusage_info_v4 (sys/resource.h): after a uuid and seven 64-bit fields."""

    def __init__(self, system: _Darwin | None = None) -> None:
        self.system = system or _Darwin()

    def machine(self) -> Machine:
        """hw.memsize; there are no cgroups, and macOS does not enforce RLIMIT_DATA."""
        return Machine(self.system.integer("hw.memsize"), None, None)

    def read(self, pid: int) -> Reading:
        """The kernel's pressure level and the process's phys_footprint, which counts Metal's buffers."""
        level = self.system.integer("kern.memorystatus_vm_pressure_level")
        known = level in tuple(Pressure)
        return Reading(
            None, Pressure(level) if level is not None and known else Pressure.NORMAL, self._footprint(pid)
        )

    def _footprint(self, pid: int) -> int | None:
        usage = self.system.rusage(pid)
        if usage is None:
            return None
        return int(struct.unpack_from("=Q", usage, self.FOOTPRINT_OFFSET)[0])


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

    That variable is a JSON object with any of physical, cgroup, rlimit, device, available: bytes or sizes
    such as "48G". Limits it does not name are none. Raises ValueError, with a sentence, for anything else.
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
        known = "physical, cgroup, rlimit, device and available"
        raise ValueError(f"{PRETEND} must be a JSON object of sizes, named {known}, not {told!r}") from None


def _rlimit() -> int | None:
    limits = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return min((n for n in limits if n != resource.RLIM_INFINITY), default=None)


def _kilobyte_lines(text: str) -> dict[str, int]:
    """Lines such as 'MemTotal:  24 kB' as bytes."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found
