"""Ceiling and budget on pretended machines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.probe import GiB, Machine, MiB, Pressure, Reading
from penstock.supervisor.budget import Ceiling, Governor, ceiling

MAC_48 = Machine(physical=48 * GiB)


def test_on_a_mac_the_working_set_less_a_reserve_decides() -> None:
    """A 48 GB Mac recommends about 36 GiB; past it command buffers fail."""
    found = ceiling(MAC_48, device=36 * GiB, asked=None, used=0)
    assert found.decided_by == "the device's limit"
    assert found.size == int(36 * GiB * 0.92)


def test_what_was_asked_for_is_taken_whole_but_not_beyond_the_device() -> None:
    assert ceiling(MAC_48, device=36 * GiB, asked=20 * GiB, used=0) == Ceiling(20 * GiB, "--memory-limit")
    assert ceiling(MAC_48, device=36 * GiB, asked=40 * GiB, used=0) == Ceiling(36 * GiB, "the device's limit")


def test_limits_on_processes_count_what_python_holds_already() -> None:
    found = ceiling(Machine(24 * GiB, cgroup=None, rlimit=2 * GiB), device=None, asked=None, used=300 * MiB)
    assert found.decided_by == "the process's rlimit"
    assert 1.5 * GiB < found.size < 2 * GiB - 300 * MiB


def test_a_tight_rlimit_leaves_room_for_what_mlx_does_not_count() -> None:
    """Heap fragments and thread stacks do not shrink with the limit."""
    found = ceiling(Machine(rlimit=600 * MiB), device=None, asked=None, used=300 * MiB)
    assert found.size == 236 * MiB


def test_a_small_machine_keeps_something() -> None:
    assert ceiling(Machine(physical=2 * GiB), device=None, asked=None, used=0).size == 1.5 * GiB


def test_falls_at_once_and_rises_slowly() -> None:
    governor = Governor(Ceiling(10 * GiB, "x"), now=0.0)
    tight = Reading(available=1 * GiB, footprint=4 * GiB)
    assert governor.update(tight, 0, 1.0) == 4.5 * GiB
    assert governor.decided_by == "memory available on this machine"
    roomy = Reading(available=20 * GiB, footprint=4 * GiB)
    assert 4.5 * GiB < governor.update(roomy, 0, 2.0) < 4.7 * GiB
    for second in range(3, 400):
        governor.update(roomy, 0, float(second))
    assert governor.budget == 10 * GiB


def test_pressure_takes_from_our_own_footprint_but_not_below_the_floor() -> None:
    governor = Governor(Ceiling(36 * GiB, "x"), now=0.0)
    warned = Reading(pressure=Pressure.WARN, footprint=20 * GiB)
    assert governor.update(warned, 5 * GiB, 1.0) == 20.5 * GiB, "half of what is above the floor"
    critical = Reading(pressure=Pressure.CRITICAL, footprint=20 * GiB)
    assert governor.update(critical, 5 * GiB, 2.0) == 16 * GiB
    assert governor.update(Reading(pressure=Pressure.CRITICAL, footprint=4 * GiB), 5 * GiB, 3.0) == 5 * GiB


def test_a_warning_that_lasts_leaves_half_of_what_the_cache_may_have() -> None:
    """A level of 2 is usual on a Mac that runs a large model."""
    governor = Governor(Ceiling(36 * GiB, "x"), now=0.0)
    for second in range(1, 600):
        footprint = min(governor.budget, 30 * GiB)
        governor.update(Reading(pressure=Pressure.WARN, footprint=footprint), 10 * GiB, float(second))
    assert governor.budget == 23 * GiB
    assert governor.decided_by == "memory pressure"


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1 << 40) | st.none(),
            st.sampled_from(Pressure),
            st.integers(0, 1 << 40) | st.none(),
        ),
        max_size=30,
    ),
    st.integers(0, 1 << 40),
)
def test_never_above_the_ceiling_nor_below_the_floor(readings: list, floor: int) -> None:
    governor = Governor(Ceiling(30 * GiB, "x"), now=0.0)
    for second, (available, pressure, footprint) in enumerate(readings):
        budget = governor.update(Reading(available, pressure, footprint), floor, float(second))
        assert min(floor, 30 * GiB) <= budget <= 30 * GiB
