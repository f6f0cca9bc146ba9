"""The queue's bounds and what a refused client is told."""

from __future__ import annotations

import pytest

from penstock.errors import Kind, PenstockError
from penstock.supervisor.queue import QueueLimits, retry_after


def refused(limits: QueueLimits, waiting: int, ids: int, prompt: int) -> PenstockError | None:
    try:
        limits.check(waiting, ids, prompt, 0.001)
    except PenstockError as error:
        return error
    return None


def test_the_last_place_is_given_and_the_next_is_refused() -> None:
    limits = QueueLimits(requests=3)
    assert refused(limits, 2, 10**9, 10**6) is None
    error = refused(limits, 3, 8_000, 1)
    assert error is not None
    assert error.kind is Kind.BUSY
    assert "busy, retry" in error.message
    assert "context" not in error.message
    assert error.retry_after == 4


def test_a_bound_on_ids_never_refuses_into_an_empty_queue() -> None:
    limits = QueueLimits(ids=1000)
    assert refused(limits, 0, 0, 5_000) is None
    assert refused(limits, 1, 500, 500) is None
    assert refused(limits, 1, 501, 500) is not None


@pytest.mark.parametrize(("ids", "speed", "seconds"), [(0, None, 1), (10, 0.001, 1), (10**7, 0.01, 60)])
def test_retry_after_stays_within_what_clients_obey(ids: int, speed: float | None, seconds: int) -> None:
    assert retry_after(ids, speed) == seconds
