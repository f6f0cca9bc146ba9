"""How long the queue may be, and when to come back if it is full. Pure.

A request waits from its arrival until its first id is computed. What is refused is told 'busy, retry' and
never anything about context length: agents compress their history when they read of that.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.errors import Kind, PenstockError

SHORTEST, LONGEST = 1, 60
"""Bounds of Retry-After in seconds: SDKs give up on more."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`requests` and `ids` that may wait, and `seconds` that one may; None: any."""

    requests: int = 512
    ids: int | None = None
    seconds: float | None = None

    def check(self, waiting: int, waiting_ids: int, prompt: int, seconds_per_id: float | None) -> None:
        """Raise BUSY if one more of `prompt` ids is too much; `seconds_per_id`: of prefill, as measured."""
        if waiting < self.requests and (self.ids is None or not waiting or waiting_ids + prompt <= self.ids):
            return
        raise PenstockError(
            Kind.BUSY,
            f"The server is busy, retry: {waiting:,} requests are waiting.",
            retry_after=retry_after(waiting_ids, seconds_per_id),
        )


def retry_after(waiting_ids: int, seconds_per_id: float | None) -> int:
    """Seconds until about half of the queue has been computed, within what clients obey."""
    expected = waiting_ids * (seconds_per_id or 0.0) / 2
    return max(SHORTEST, min(LONGEST, round(expected)))
