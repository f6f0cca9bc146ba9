"""What a dead engine died of, as far as its exit, its last words and its books tell. Pure.

A death for memory is nobody's fault: the system's killer, a failed malloc, a device that ran out. Everything
else (an abort, an exception, a hang) is held against the rows that were running.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Sequence

from penstock import wire
from penstock.guilt import MEMORY_WORDS

_log = logging.getLogger("penstock.supervisor")

NEARLY = 0.9
"""Of its budget: an engine that held so much when a signal ended it died of memory, as likely as not."""
_LAST = 30
_VOLATILE = re.compile(r"0x[0-9a-fA-F]+|\d{2}:\d{2}:\d{2}\S*")


def memory_sign(
    code: int, words: Sequence[str], status: wire.Status | None, platform: str = sys.platform
) -> str | None:
    """Why it looks like memory, in words, or None.

    `code`: as subprocess has it; `words`: the last lines it printed; `status`: the last it said of its books.
    """
    if code == -signal.SIGKILL:
        return "killed, as the system does when memory runs out"
    if code == -signal.SIGSEGV and platform == "linux":
        return "what a failed allocation looks like"
    said = next((line for line in reversed(words[-_LAST:]) if MEMORY_WORDS.search(line)), None)
    if said is not None:
        return f"its last words: {said.strip()[:200]}"
    if code < 0 and status is not None and status.active + status.pooled >= NEARLY * status.budget:
        return "its budget was nearly used up"
    return None


class DeathLog:
    """The log of deaths: the same last words, addresses and times apart, are said once."""

    def __init__(self) -> None:
        self._words: list[str] = []

    def say(self, why: str, memory: str | None, words: Sequence[str]) -> None:
        """`memory`: why it looks like that."""
        _log.error("the engine died: %s", why)
        if memory is not None:
            _log.warning("it looks like memory (%s): the next engine gets less", memory)
        plain = [_VOLATILE.sub("", line) for line in words]
        if plain and plain == self._words:
            _log.error("engine: the same last words as before")
        else:
            for line in words:
                _log.error("engine: %s", line)
        self._words = plain
