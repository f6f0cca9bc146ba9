"""The shared page: what the engine is doing right now, readable by the front even after the engine died.

One anonymous shared mapping per engine, inherited by descriptor. The engine's loop thread is the only
writer, the front the only reader; neither ever waits for the other. Counters are single aligned words. A
description of the sub-step goes to one of two slots, and a sequence number says which one counts, so a writer
killed in the middle leaves the last whole description in place. A checksum catches reads that a CPU with
weak store ordering (arm64) could tear.

    word 0 magic | 1 sequence | 2 steps | 3 beats | … | slot 0 | slot 1
    slot: checksum, then (sequence, phase, row count, predicted seconds), then (id, start, end) per row
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

MAX_ROWS = 256
SIZE = 16384
_MAGIC = 0x50454E53544F434B
_SEQUENCE, _STEPS, _BEATS = 1, 2, 3
_CHECKSUM = struct.Struct("=Q")
_HEAD = struct.Struct("=QIId")
_FIRST_SLOT = 64
_ROW = 24
_SLOT = _CHECKSUM.size + _HEAD.size + _ROW * MAX_ROWS
Row = tuple[int, int, int]
"""A sequence's id, where its computed ids end, and where the launched steps would bring it."""


class Phase(IntEnum):
    """What kind of sub-step runs. FIRST_OF_SHAPE may compile kernels and gets as long as a load."""

    LOADING = 0
    PROBE = 1
    IDLE = 2
    PREFILL = 3
    DECODE = 4
    FIRST_OF_SHAPE = 5


@dataclass(frozen=True, slots=True)
class View:
    """One whole reading. `rows` run now; `predicted`: seconds that the sub-step takes."""

    sequence: int
    steps: int
    beats: int
    phase: Phase
    predicted: float
    rows: tuple[Row, ...]


@cache
def _row_struct(count: int) -> struct.Struct:
    return struct.Struct(f"={3 * count}Q")


class Page:
    """A mapping of the page; `create` on the front's side, `attach` on the engine's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._last = View(0, 0, 0, Phase.LOADING, 0.0, ())

    @classmethod
    def create(cls) -> Page:
        """A new page, all zero. Nothing of it has a name, so nothing of it can outlive its processes."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("penstock-page", os.MFD_CLOEXEC)
        else:
            fd, path = tempfile.mkstemp(prefix="penstock-page")
            os.unlink(path)
        os.ftruncate(fd, SIZE)
        page = cls(fd)
        page._words[0] = _MAGIC
        return page

    @classmethod
    def attach(cls, fd: int) -> Page:
        """The page behind an inherited descriptor. Raises ValueError if it is something else."""
        page = cls(fd)
        if page._words[0] != _MAGIC:
            page.close()
            raise ValueError(f"descriptor {fd} is not a shared page")
        return page

    def begin(self, phase: Phase, rows: Sequence[Row] = (), predicted: float = 0.0) -> None:
        """Writer: the sub-step about to be launched. Rows beyond MAX_ROWS are left out."""
        flat = [word for row in rows[:MAX_ROWS] for word in row]
        count = len(flat) // 3
        sequence = self._words[_SEQUENCE] + 1
        body = _HEAD.pack(sequence, phase, count, predicted) + _row_struct(count).pack(*flat)
        at = _FIRST_SLOT + (sequence & 1) * _SLOT
        self._bytes[at : at + _CHECKSUM.size] = _CHECKSUM.pack(zlib.crc32(body))
        self._bytes[at + _CHECKSUM.size : at + _CHECKSUM.size + len(body)] = body
        self._words[_SEQUENCE] = sequence

    def step_done(self) -> None:
        """Writer: a step has been computed and its results were read."""
        self._words[_STEPS] += 1

    def beat(self) -> None:
        """Writer: the loop thread is alive (a turn while idle, a shard while loading)."""
        self._words[_BEATS] += 1

    def read(self) -> View:
        """Reader: the newest whole reading; an older one where the writer is too quick for eight attempts."""
        words = self._words
        for _ in range(8):
            sequence = words[_SEQUENCE]
            slot = self._slot(sequence) if sequence else (Phase.LOADING, 0.0, ())
            if slot is not None:
                self._last = View(sequence, words[_STEPS], words[_BEATS], *slot)
                break
        return self._last

    def _slot(self, sequence: int) -> tuple[Phase, float, tuple[Row, ...]] | None:
        at = _FIRST_SLOT + (sequence & 1) * _SLOT
        raw = bytes(self._bytes[at : at + _SLOT])
        (checksum,) = _CHECKSUM.unpack_from(raw)
        found, phase, count, predicted = _HEAD.unpack_from(raw, _CHECKSUM.size)
        if found != sequence or count > MAX_ROWS:
            return None
        body_end = _CHECKSUM.size + _HEAD.size + _ROW * count
        if zlib.crc32(raw[_CHECKSUM.size : body_end]) != checksum:
            return None
        flat = _row_struct(count).unpack_from(raw, _CHECKSUM.size + _HEAD.size)
        return Phase(phase), predicted, tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))

    def close_fd(self) -> None:
        """Gives the descriptor back; the mapping stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        self.close_fd()
        self._words.release()
        self._bytes.release()
        self._map.close()
