from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sizes import gigabytes, parse_size, physical_memory

FACTORS = {
    "": 1,
    "B": 1,
    "K": 1000,
    "KB": 1000,
    "KiB": 1024,
    "M": 1000**2,
    "MB": 1000**2,
    "MiB": 1024**2,
    "G": 1000**3,
    "GB": 1000**3,
    "GiB": 1024**3,
    "T": 1000**4,
    "TB": 1000**4,
    "TiB": 1024**4,
}


@given(st.integers(0, 10**6), st.sampled_from(sorted(FACTORS)), st.booleans())
def test_a_whole_number_of_units_is_exact(number: int, unit: str, lower: bool) -> None:
    written = f"{number}{unit.lower() if lower else unit}"
    assert parse_size(written) == number * FACTORS[unit]


@given(st.decimals(0, 100, places=2), st.integers(0, 2**48))
def test_a_share_is_never_more_than_the_whole(percent: object, whole: int) -> None:
    assert 0 <= parse_size(f"{percent}%", whole=whole) <= whole


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1.2.3G", "iB", "5iB", "8X", "nan", "inf", "1e9", "101%", "٣G"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a s"):
        parse_size(text, whole=100)


def test_fractions_and_spaces_are_read() -> None:
    assert parse_size(" 1.5 GiB ") == 1_610_612_736
    assert parse_size("0.1G") == 100_000_000


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(ValueError, match="not a share"):
        parse_size("75%")


def test_sizes_are_printed_in_decimal_gigabytes() -> None:
    assert gigabytes(23_350_000_000) == "23.4 GB"
    assert gigabytes(0) == "0.0 GB"
    assert gigabytes(99_900_000) == "99.9 MB"
    assert gigabytes(1_234_000_000_000) == "1,234.0 GB"


def test_this_machine_has_memory() -> None:
    assert physical_memory() > 10**8
