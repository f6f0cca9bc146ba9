"""Which deaths look like memory; last words once."""

from __future__ import annotations

import logging
import signal

import pytest

from penstock import wire
from penstock.supervisor.autopsy import DeathLog, memory_sign


def status(active, budget=100):
    return wire.Status({}, budget, 0, 0, active, 0, 0, 0, {})


@pytest.mark.parametrize(("code", "words", "books", "platform", "memory"), [
    (-signal.SIGKILL, [], None, "darwin", True),
    (-signal.SIGSEGV, [], None, "linux", True),
    (-signal.SIGSEGV, [], None, "darwin", False),
    (-signal.SIGABRT, [], None, "linux", False),
    (-signal.SIGABRT, [], status(95), "linux", True),
    (-signal.SIGABRT, [], status(50), "linux", False),
    (1, [], status(99), "linux", False),
    (1, ["RuntimeError: [METAL] Command buffer failed: Insufficient Memory (…)"], None, "darwin", True),
    (1, ["cudaMallocAsync(&data, size, stream) failed: out of memory"], None, "linux", True),
    (1, ["[malloc] Unable to allocate 123 bytes.", *["x"] * 29], None, "linux", True),
    (1, ["out of memory", *["x"] * 40], None, "linux", False),
    (1, ["KeyError: 'x'"], None, "linux", False),
])  # fmt: skip
def test_what_looks_like_memory(code, words, books, platform, memory):
    assert (memory_sign(code, words, books, platform) is not None) == memory


def test_the_same_traceback_is_logged_once(caplog):
    deaths = DeathLog()
    with caplog.at_level(logging.ERROR):
        deaths.say("exited", None, ["Thread 0x00007f01:", "KeyError: 'x'"])
        deaths.say("exited", None, ["Thread 0x00007fff:", "KeyError: 'x'"])
        deaths.say("exited", None, ["KeyError: 'y'"])
    assert caplog.text.count("KeyError: 'x'") == 1
    assert caplog.text.count("KeyError: 'y'") == 1
    assert caplog.text.count("the engine died") == 3
