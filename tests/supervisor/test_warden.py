"""Which memory the budget follows: the system's, or that of a device with memory of its own."""

from __future__ import annotations

import msgspec

from penstock import wire
from penstock.memory.probe import GiB, Machine, Pressure, Pretended, Reading
from penstock.supervisor.warden import Warden

SMALL_HOST = Machine(physical=32 * GiB, cgroup=30 * GiB, rlimit=20 * GiB)
CUDA = wire.Device("cuda", "H200", 136 * GiB, 1 * GiB)


def books(held: int, device_free: int | None) -> wire.Status:
    empty = wire.Status({}, 0, 0, 0, 0, 0, 0, 0, {})
    return msgspec.structs.replace(empty, device_free=device_free, device_held=held)


def test_a_host_smaller_than_its_device_does_not_limit_it():
    told = Warden(Pretended(SMALL_HOST)).device(CUDA, 0.0)
    assert told.decided_by == "the device's limit"
    assert told.size == int(136 * GiB * 0.92)


def test_a_pretended_device_still_limits_it():
    told = Warden(Pretended(Machine(physical=32 * GiB, device=36 * GiB))).device(CUDA, 0.0)
    assert told.size == int(36 * GiB * 0.92)


def test_the_budget_follows_what_the_device_has_left_and_not_the_host():
    host = Reading(available=1 * GiB, pressure=Pressure.CRITICAL, footprint=2 * GiB)
    warden = Warden(Pretended(SMALL_HOST, host))
    first = warden.device(CUDA, 0.0)
    assert warden.look(1, books(held=40 * GiB, device_free=96 * GiB), 1.0) is None
    # Another program takes most of the device: what is left, and what we hold, is what there is.
    cut = warden.look(1, books(held=40 * GiB, device_free=10 * GiB), 2.0)
    assert cut is not None
    assert cut.size == int(49.5 * GiB) < first.size
    assert cut.decided_by == "memory available on this machine"


def test_without_a_device_of_its_own_the_host_decides():
    host = Reading(available=1 * GiB, footprint=2 * GiB)
    warden = Warden(Pretended(Machine(physical=32 * GiB), host))
    warden.device(wire.Device("cpu", "x", None, 0), 0.0)
    cut = warden.look(1, books(held=2 * GiB, device_free=None), 1.0)
    assert cut is not None
    assert cut.size == int(2.5 * GiB)
