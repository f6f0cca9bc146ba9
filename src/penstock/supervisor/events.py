"""The last things that an operator may want to know, each with what can be done about it.

Invariant: at most `MOST` events, whatever happens; what differs from one that is there in numbers alone is
counted with it. No text of prompts or answers.
"""

from __future__ import annotations

import re
from collections import deque
from time import time

from penstock.errors import Kind, PenstockError
from penstock.status import Event

MOST = 50
LONGEST = 300
"""Characters of a message."""
ADVICE = {
    "context_length": "`penstock plan` tells what fits; a more strongly quantised model leaves more.",
    "template": "The model's chat template refuses these messages; --chat-template takes another one.",
    "too_large": "The client sends a body beyond the limit: fewer or shorter messages.",
    "busy": "More arrives than is computed: fewer clients at a time, or a longer queue by --max-queue.",
    "unauthorized": "A client sends no key, or a wrong one.",
    "forbidden_host": "A client names this server by a host name that --allowed-hosts does not list.",
    "forbidden_origin": "A web page calls this server; if it may, name its origin in --allowed-origins.",
    "model_not_found": "A client names another model; without --strict-model-names it would be served.",
    "out_of_memory": "Other programs take memory, or --memory-limit is tight: close some, or raise it.",
    "engine_died": "This request ended the engine twice; a report of it with the log would help.",
    "engine_halted": "The log tells why the model cannot be served.",
    "internal": "A fault of this program; a report of it with the log would help.",
    "engine_death": "Open streams go on in a new engine. The log has its last words.",
    "budget_cut": "Other programs need the memory: the prompt cache gives way first, then new requests wait.",
    "preemption": "Rows need more than the budget holds: fewer at a time would be quicker.",
    "given_up": "A request needs more than is free on this machine now; it was told to come back.",
    "step_error": "The device reported a failure; rows that it concerned were computed again.",
    "audit_repair": "Books and memory differed, and were healed; a report with the log would help.",
}
"""By an event's kind: an error's label, or the name of what happened."""


class Events:
    """The ring. Oldest first."""

    def __init__(self) -> None:
        self.last: deque[Event] = deque(maxlen=MOST)

    def note(self, kind: str, level: str, message: str, count: int = 1) -> None:
        """`level`: info, warning or error."""
        message = message[:LONGEST]
        like = next((e for e in self.last if e.kind == kind and _plain(e.message) == _plain(message)), None)
        if like is not None:
            self.last.remove(like)
            count += like.count
        advice = ADVICE.get(kind, "")
        self.last.append(
            Event(time=time(), kind=kind, level=level, message=message, advice=advice, count=count)
        )

    def failed(self, error: PenstockError) -> None:
        """A client was told this; what only that client can mend is no event."""
        kind: Kind = error.kind
        if kind.label in ADVICE:
            ours = kind.value.status >= 500 and kind is not Kind.BUSY
            self.note(kind.label, "error" if ours else "warning", error.message)


def _plain(message: str) -> str:
    return re.sub(r"\d[\d.,]*", "", message)
