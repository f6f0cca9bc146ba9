"""The probe on laid-out /proc and /sys trees, on a documented Mac, and on this machine."""

from __future__ import annotations

import os
import resource
import struct
import sys
from pathlib import Path

import pytest

from penstock.memory import probe
from penstock.memory.probe import DarwinProbe, GiB, LinuxProbe, Machine, Pressure


def lay_out(root: Path, files: dict[str, str]) -> LinuxProbe:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return LinuxProbe(root)


MEMINFO = "MemTotal:       25165824 kB\nMemFree:  1 kB\nMemAvailable:   20971520 kB\nHugePages_Total: 0\n"


def test_cgroup_v2_limits_are_the_tightest_on_the_path(tmp_path: Path) -> None:
    linux = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/system.slice/run.scope\n",
            "sys/fs/cgroup/system.slice/run.scope/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{4 * GiB}\n",
            "sys/fs/cgroup/system.slice/memory.current": f"{1 * GiB}\n",
            "sys/fs/cgroup/memory.max": f"{8 * GiB}\n",
            "sys/fs/cgroup/memory.current": f"{7 * GiB}\n",
        },
    )
    assert linux.machine().cgroup == 4 * GiB
    assert linux.machine().physical == 24 * GiB
    # The root has only 1 GiB left, the slice 3: the tighter room counts, not MemAvailable.
    assert linux.read(1).available == 1 * GiB


@pytest.mark.parametrize(
    ("base", "line", "names", "stat"),
    [
        ("", "0::/a\n", ("memory.max", "memory.current"), "anon 5\ninactive_file {}\nactive_file 7\n"),
        (
            "memory/",
            "5:memory:/a\n",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "inactive_file 3\ntotal_inactive_file {}\ntotal_active_file 7\n",
        ),
    ],
)
def test_pages_of_files_that_were_read_are_not_used_up(
    tmp_path: Path, base: str, line: str, names: tuple[str, str], stat: str
) -> None:
    """The weights' file, once read, stays in a container's page cache and counts in its usage."""
    place = f"sys/fs/cgroup/{base}a"
    linux = lay_out(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": line,
            f"{place}/{names[0]}": f"{32 * GiB}\n",
            f"{place}/{names[1]}": f"{31 * GiB}\n",
            f"{place}/memory.stat": stat.format(11 * GiB),
        },
    )
    assert linux.read(1).available == 12 * GiB


def test_cgroup_v1_says_no_limit_by_a_huge_number(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,memory:/docker/a\n3:cpuset:/\n",
        f"{base}/docker/a/memory.limit_in_bytes": "9223372036854771712",
        f"{base}/docker/a/memory.usage_in_bytes": "5",
    }
    assert lay_out(tmp_path, files).machine().cgroup is None
    files[f"{base}/docker/a/memory.limit_in_bytes"] = str(2 * GiB)
    assert lay_out(tmp_path, files).machine().cgroup == 2 * GiB


def test_without_any_file_nothing_is_known(tmp_path: Path) -> None:
    linux = LinuxProbe(tmp_path)
    reading = linux.read(1)
    assert (reading.available, reading.pressure, reading.footprint) == (None, Pressure.NORMAL, None)
    assert linux.machine().physical is None


@pytest.mark.parametrize(
    ("some", "full", "level"),
    [(0.0, 0.0, Pressure.NORMAL), (12.5, 1.0, Pressure.WARN), (90.0, 55.0, Pressure.CRITICAL)],
)
def test_stall_shares_give_the_pressure(tmp_path: Path, some: float, full: float, level: Pressure) -> None:
    text = f"some avg10={some} avg60=0.00 avg300=0.00 total=1\nfull avg10={full} avg60=0 avg300=0 total=2\n"
    assert lay_out(tmp_path, {"proc/pressure/memory": text}).read(1).pressure is level


def test_footprint_counts_what_is_swapped_out(tmp_path: Path) -> None:
    linux = lay_out(tmp_path, {"proc/7/status": "Name:\tx\nVmRSS:\t  100 kB\nVmSwap:\t 24 kB\nThreads:\t3\n"})
    assert linux.read(7).footprint == 124 * 1024


class Mac:
    """A 48 GB Mac under memory pressure, with the field layout of sys/resource.h."""

    def integer(self, name: str) -> int | None:
        return {"hw.memsize": 48 * GiB, "kern.memorystatus_vm_pressure_level": 2}.get(name)

    def rusage(self, pid: int) -> bytes | None:
        if pid != 42:
            return None
        # uuid, user, system, package wakeups, interrupt wakeups, page-ins, wired, resident, phys_footprint
        return struct.pack("=16s8Q", b"u" * 16, 1, 2, 3, 4, 5, 6, 7, 23 * GiB) + bytes(400)


@pytest.mark.parametrize(("megabytes", "bytes_"), [(0, None), (None, None), (40_960, 40 * GiB)])
def test_a_macs_wired_limit_is_none_where_it_is_not_set(megabytes: int | None, bytes_: int | None) -> None:
    class Limited(Mac):
        def integer(self, name: str) -> int | None:
            return megabytes if name == "iogpu.wired_limit_mb" else super().integer(name)

    found = DarwinProbe(Limited()).machine()  # type: ignore[arg-type]
    assert found == Machine(48 * GiB, wired=bytes_)


def test_a_mac_goes_by_pressure_and_footprint() -> None:
    mac = DarwinProbe(Mac())  # type: ignore[arg-type]
    assert mac.machine() == Machine(48 * GiB, None, None)
    reading = mac.read(42)
    assert reading.available is None, "free bytes mislead on macOS"
    assert (reading.pressure, reading.footprint) == (Pressure.WARN, 23 * GiB)
    assert mac.read(1).footprint is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads this machine's /proc")
def test_this_machine() -> None:
    reading = LinuxProbe().read(os.getpid())
    assert reading.footprint is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 10 * probe.MiB < reading.footprint < 1.2 * peak  # ru_maxrss is brought up to date late
    assert reading.available is not None
    assert 0 < reading.available <= (LinuxProbe().machine().physical or 0)


def test_a_pretended_machine_is_as_told_and_its_processes_are_true() -> None:
    told = '{"physical": "48G", "device": 36000000000, "available": "20GiB"}'
    found = probe.system_probe({probe.PRETEND: told})
    assert found.machine() == Machine(physical=48_000_000_000, device=36_000_000_000)
    reading = found.read(os.getpid())
    assert (reading.available, reading.pressure) == (20 * GiB, Pressure.NORMAL)
    assert reading.footprint == pytest.approx(probe.system_probe({}).read(os.getpid()).footprint, rel=0.2)


@pytest.mark.parametrize("told", ["{", "[]", '{"ram": "8G"}', '{"device": "much"}', '{"device": null}'])
def test_a_machine_that_cannot_be_pretended_is_refused_by_name(told: str) -> None:
    with pytest.raises(ValueError, match="PENSTOCK_PRETEND must be a JSON object of sizes"):
        probe.system_probe({probe.PRETEND: told})
