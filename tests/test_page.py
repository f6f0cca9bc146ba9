"""The shared page: whole readings, also of a writer killed in the middle or in another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from penstock.page import MAX_ROWS, SIZE, Page, Phase


@pytest.fixture
def pair():
    front = Page.create()
    engine = Page.attach(os.dup(front.fd))
    yield front, engine
    engine.close()
    front.close()


def test_a_new_page_says_loading(pair):
    view = pair[0].read()
    assert (view.phase, view.rows, view.steps, view.beats) == (Phase.LOADING, (), 0, 0)


def test_the_front_reads_what_the_engine_wrote(pair):
    front, engine = pair
    engine.begin(Phase.DECODE, [(7, 60000, 60001), (1 << 60, 3, 9)], predicted=0.25)
    engine.step_done()
    engine.beat()
    engine.beat()
    view = front.read()
    assert view.phase is Phase.DECODE
    assert view.rows == ((7, 60000, 60001), (1 << 60, 3, 9))
    assert (view.predicted, view.steps, view.beats) == (0.25, 1, 2)


def test_rows_beyond_the_bound_are_left_out(pair):
    front, engine = pair
    engine.begin(Phase.DECODE, [(id, id, id + 1) for id in range(MAX_ROWS + 5)])
    assert len(front.read().rows) == MAX_ROWS


def test_a_writer_killed_in_the_middle_leaves_the_last_whole_reading(pair):
    front, engine = pair
    engine.begin(Phase.PREFILL, [(1, 10, 11)])
    before = front.read()
    words, engine._words = engine._words, _Dies(engine._words)
    with pytest.raises(_Dies.Killed):
        engine.begin(Phase.DECODE, [(2, 20, 30)])
    engine._words = words
    assert front.read() == before


class _Dies:
    """Stands in for the counters, and dies where the new sequence number would be published."""

    class Killed(Exception):
        pass

    def __init__(self, words):
        self._words = words

    def __getitem__(self, index):
        return self._words[index]

    def __setitem__(self, index, value):
        raise self.Killed


def test_a_torn_slot_is_not_believed(pair):
    front, engine = pair
    engine.begin(Phase.PREFILL, [(1, 10, 11)])
    whole = front.read()
    engine.begin(Phase.DECODE, [(2, 20, 30)])
    row = bytes(engine._bytes[:SIZE]).index((20).to_bytes(8, sys.byteorder))
    engine._bytes[row] = 21
    assert front.read() == whole


def test_another_descriptor_is_refused():
    fd = os.memfd_create("other") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    os.ftruncate(fd, SIZE)
    with pytest.raises(ValueError, match="not a shared page"):
        Page.attach(fd)


def test_readings_of_a_racing_writer_are_whole_and_survive_it(pair):
    front, _ = pair
    os.set_inheritable(front.fd, True)
    writer = subprocess.Popen([sys.executable, "-c", _RACER, str(front.fd)], pass_fds=[front.fd])
    try:
        while front.read().sequence < 2000:
            assert writer.poll() is None
            view = front.read()
            assert len({position for _, position, _ in view.rows}) <= 1
            assert len(view.rows) == (view.rows[0][1] % 64 + 1 if view.rows else 0)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    last = front.read()
    assert last == front.read()
    assert last.rows


_RACER = """
import sys
from penstock.page import Page, Phase
page = Page.attach(int(sys.argv[1]))
n = 0
while True:
    n += 1
    page.begin(Phase.DECODE, [(id, n, n + 1) for id in range(n % 64 + 1)])
"""
