"""What the doctor makes of facts, those of Macs among them."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from penstock.doctor import checks
from penstock.doctor.checks import Finding
from penstock.memory.probe import DarwinProbe, GiB, Machine, Pressure, Reading

NEEDS = ["mlx<0.33,>=0.32.3", "mlx-lm<0.33,>=0.32.2", "rich>=14", 'mlx[cpu]<0.33,>=9; extra == "cpu"']
PLAN = {"weights_bytes": 4_000_000_000, "ceiling_bytes": 36_000_000_000, "context_length": 40_960}


class Mac:
    """What sysctl says on a Mac with 48 GB: 0 is the limit's default, and then not a limit."""

    def __init__(self, wired: int | None, pressure: int = 1) -> None:
        self.values = {
            "hw.memsize": 48 * GiB,
            "iogpu.wired_limit_mb": wired,
            "kern.memorystatus_vm_pressure_level": pressure,
        }

    def integer(self, name: str) -> int | None:
        return self.values[name]

    def rusage(self, pid: int) -> bytes | None:
        return struct.pack("=16s8Q", b"u" * 16, 0, 0, 0, 0, 0, 0, 0, 3 * GiB) + bytes(400)


def only(findings: Any) -> Finding:
    (found,) = findings
    return found


@pytest.mark.parametrize(
    ("mlx", "level"),
    [
        ("0.32.3", "ok"),
        ("0.32.10", "ok"),
        ("0.32.4.dev20261101+abc", "ok"),
        ("0.32.2", "fail"),
        ("0.33.0", "fail"),
        (None, "fail"),
    ],
)
def test_versions_against_what_is_required(mlx: str | None, level: str) -> None:
    found = {f.what.split()[0]: f for f in checks.packages({"mlx": mlx, "mlx-lm": "0.32.2"}, NEEDS)}
    assert set(found) == {"mlx", "mlx-lm"}
    assert found["mlx"].level == level
    assert found["mlx-lm"].level == "ok"
    if level == "fail":
        assert "<0.33,>=0.32.3 is needed" in found["mlx"].what
        assert found["mlx"].change == "install 'mlx<0.33,>=0.32.3'"


@pytest.mark.parametrize(
    ("megabytes", "level", "words"),
    [
        (0, "ok", "is not set: macOS decides"),
        (None, "ok", "is not set: macOS decides"),
        (40_960, "ok", "lets the GPU hold 42.9 GB of 51.5 GB"),
        (47_104, "warn", "lets the GPU hold 49.4 GB of 51.5 GB"),
        (16_384, "warn", "lets the GPU hold 17.2 GB of 51.5 GB"),
    ],
)
def test_the_wired_limit_of_a_mac(megabytes: int | None, level: str, words: str) -> None:
    mac = DarwinProbe(Mac(megabytes))  # type: ignore[arg-type]
    found = only(checks.wired(mac.machine()))
    assert found.level == level
    assert words in found.what
    assert ("sysctl iogpu.wired_limit_mb=0" in found.change) is (level == "warn")


def test_a_mac_under_pressure_is_told_so() -> None:
    mac = DarwinProbe(Mac(0, pressure=4))  # type: ignore[arg-type]
    limits, short = checks.memory(mac.machine(), mac.read(1), 36_000_000_000, "the device's limit")
    assert limits == Finding(
        "machine", "ok", "memory 51.5 GB: a server may hold 36.0 GB (the device's limit)"
    )
    assert (short.level, "pressure: critical" in short.what) == ("warn", True)


def test_linux_in_a_container_with_little_left() -> None:
    machine, now = Machine(64 * GiB, cgroup=8 * GiB), Reading(2_000_000_000, Pressure.NORMAL)
    limits, short = checks.memory(machine, now, 7_000_000_000, "the cgroup's limit")
    assert "memory 68.7 GB, cgroup 8.6 GB: a server may hold 7.0 GB" in limits.what
    assert "only 2.0 GB are free" in short.what


def test_other_programs_count_by_what_they_hold() -> None:
    programs = [
        (11, "/usr/bin/python3 -m mlx_lm.server --model someone/secret", 9_000_000_000),
        (12, "/Applications/LM Studio.app/Contents/MacOS/LM Studio", 5_000_000_000),
        (13, "vim mlx_lm/server.py", 30_000_000),
        (14, "/usr/bin/postgres", 9_000_000_000),
        (15, "ollama runner --model x", 200_000_000),
    ]
    found = list(checks.others(programs))
    assert [(f.level, f.what) for f in found] == [
        ("warn", "mlx_lm (process 11) holds 9.0 GB"),
        ("warn", "LM Studio (process 12) holds 5.0 GB"),
        ("warn", "ollama (process 15) holds 0.2 GB"),
    ]
    assert "someone" not in str(found)
    assert only(checks.others(programs[2:4])).level == "ok"


@pytest.mark.parametrize(
    ("free", "needed", "level"),
    [
        (50_000_000_000, 0, "ok"),
        (5_000_000_000, 0, "warn"),
        (5_000_000_000, 6_000_000_000, "fail"),
        (50_000_000_000, 6_000_000_000, "ok"),
    ],
)
def test_room_on_the_disk(free: int, needed: int, level: str) -> None:
    found = only(checks.disk(free, needed))
    assert found.level == level
    assert bool(found.change) is (level != "ok")


@pytest.mark.parametrize(
    ("plan", "level"),
    [
        ({"fits": True, "longest": 40_960}, "ok"),
        ({"fits": True, "longest": 2_000}, "warn"),
        ({"fits": True, "longest": 512, "context_length": 512}, "ok"),
        ({"fits": False, "longest": 0}, "fail"),
    ],
)
def test_whether_a_model_fits(plan: dict[str, Any], level: str) -> None:
    assert only(checks.fits({**PLAN, **plan})).level == level


HEALTHY = {"status": "ok", "model": "m", "backend": "metal", "engine_deaths": 0, "memory": None}


@pytest.mark.parametrize(
    ("status", "changes", "levels"),
    [
        (200, {}, ["ok", "ok"]),
        (200, {"status": "unloaded"}, ["ok", "ok"]),
        (503, {"status": "loading"}, ["ok", "warn"]),
        (503, {"status": "halted", "model": None, "reason": "no room"}, ["ok", "fail"]),
        (200, {"engine_deaths": 2}, ["ok", "ok", "warn"]),
        (200, {"memory": {"budget": 5, "ceiling": 9}}, ["ok", "ok", "warn"]),
        (200, {"memory": {"budget": 9, "ceiling": 9}}, ["ok", "ok"]),
        (0, {"status": None}, ["ok", "fail"]),
    ],
)
def test_a_server_by_its_own_words(status: int, changes: dict[str, Any], levels: list[str]) -> None:
    found = list(checks.server(status, {**HEALTHY, **changes}, "1.0", "1.0"))
    assert [finding.level for finding in found] == levels
    assert all(finding.change for finding in found if finding.level != "ok")


def test_another_version_and_another_program() -> None:
    assert next(iter(checks.server(200, HEALTHY, "0.9", "1.0"))).level == "warn"
    assert "no penstock" in only(checks.server(200, {"status": "ok"}, None, "1.0")).what
