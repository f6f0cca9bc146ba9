"""Counts what the front holds for clients, and refuses new work beyond the cap.

Owns one number of bytes. Every request has one `Lease`, resized as its body arrives, becomes ids, and its
answer grows. Taking more for an arriving request may be refused (BUSY); what a running request adds is only
counted, because ending it would lose the work. Invariant: when no request is open, nothing is held.
"""

from __future__ import annotations

from types import TracebackType

from penstock.errors import Kind, PenstockError

IDLE = 8_192
"""Bytes a request counts for before its body arrives: its task, headers and buffers."""
UNSENT = 96_000
"""Bytes an open answer counts for per choice: 64 KB unsent in uvicorn, queued ids, held-back text."""


class Admission:
    """The front's memory account."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.open = 0

    def lease(self) -> Lease:
        """A new request's share. Raises BUSY."""
        return Lease(self)


class Lease:
    """What one request holds, in bytes; a context manager that gives it back."""

    def __init__(self, account: Admission) -> None:
        self._account = account
        self.bytes = 0
        self.resize(IDLE)
        account.open += 1

    def resize(self, size: int, *, refuse: bool = True) -> None:
        """Hold `size` bytes from now on.

        Raises BUSY if that is more than before and over the limit; TOO_LARGE if it is so by itself.
        """
        account, grown = self._account, size - self.bytes
        if refuse and grown > 0 and account.held + grown > account.limit:
            if size > account.limit:
                raise PenstockError(Kind.TOO_LARGE, "The request is more than the server's --front-memory.")
            raise PenstockError(Kind.BUSY, "The server is busy; retry in a moment.", retry_after=2)
        account.held += grown
        self.bytes = size

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._account.held -= self.bytes
        self._account.open -= 1
        self.bytes = 0
