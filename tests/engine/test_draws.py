from collections import Counter
from itertools import pairwise

import pytest

from penstock.engine import draws


def test_a_draw_is_the_same_number_on_every_platform_and_in_every_release():
    assert draws.uniform(0, 0, 0, draws.TOKEN) == 0.8887151479721069
    assert draws.uniform(-(2**70), 3, 64_523, draws.XTC) == 0.3940660357475281


@pytest.mark.parametrize(
    "other", [(8, 1, 5, "token"), (7, 2, 5, "token"), (7, 1, 6, "token"), (7, 1, 5, "xtc")]
)
def test_each_part_of_the_key_counts(other):
    assert draws.uniform(7, 1, 5, "token") != draws.uniform(*other)


def test_parts_of_the_key_do_not_run_into_each_other():
    assert draws.uniform(1, 11, 1, "token") != draws.uniform(11, 1, 1, "token")


def test_numbers_are_spread_evenly_below_one():
    numbers = [draws.uniform(5, 0, position, draws.TOKEN) for position in range(20_000)]
    assert min(numbers) >= 0
    assert max(numbers) <= 1 - 2**-24
    counts = Counter(int(number * 20) for number in numbers)
    chi_squared = sum((counts[i] - 1000) ** 2 / 1000 for i in range(20))
    assert chi_squared < 43.8  # the 0.1 % quantile at 19 degrees of freedom
    neighbours = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(numbers)) * 12 / 20_000
    assert abs(neighbours) < 0.025
