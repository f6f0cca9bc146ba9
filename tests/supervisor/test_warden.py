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


class Following:
    """A machine under pressure, whose engine's process holds what its books say."""

    def __init__(self, pressure: Pressure) -> None:
        self.pressure = pressure
        self.held = 0

    def machine(self) -> Machine:
        return Machine(physical=64 * GiB)

    def read(self, pid: int) -> Reading:
        return Reading(None, self.pressure, self.held)


def test_who_waits_is_told_of_the_last_bytes_that_it_needs():
    probe = Following(Pressure.CRITICAL)
    warden = Warden(probe, asked=10 * GiB)
    warden.device(wire.Device("metal", "M4", 48 * GiB, 0), 0.0)
    probe.held = 8 * GiB
    idle = msgspec.structs.replace(books(0, None), floor=8 * GiB, least=8 * GiB)
    told = warden.look(1, idle, 1.0)
    assert told is not None
    assert told.size == 8 * GiB
    little = msgspec.structs.replace(idle, floor=8 * GiB + 1000, least=8 * GiB + 1000)
    assert warden.look(1, little, 2.0) is None
    told = warden.look(1, msgspec.structs.replace(little, waiting=1), 3.0)
    assert told is not None
    assert told.size == 8 * GiB + 1000


def test_a_notch_leaves_the_oldest_row_its_room():
    probe = Following(Pressure.NORMAL)
    warden = Warden(probe, asked=10 * GiB)
    warden.device(wire.Device("metal", "M4", 48 * GiB, 0), 0.0)
    warden.notches.lower(1.0)
    books_ = msgspec.structs.replace(books(0, None), least=int(9.5 * GiB), floor=int(9.9 * GiB), waiting=1)
    told = warden.look(1, books_, 2.0)
    assert told is not None
    assert told.size == int(9.5 * GiB)
