"""The predictor's scalars, kept from one start to the next: the second start does not measure again.

One small JSON file per fingerprint of everything that shapes a step. A file that can't be read or written
costs a calibration, never a start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
from msgspec import structs

from penstock import __version__
from penstock.memory.predict import Curve, Scalars, Transient

FORM = 4
"""Of the numbers in a file and of how they are measured: another one is measured anew, never misread."""


def fingerprint(config: Mapping[str, Any], mode: str, pipelined: bool, longest_chunk: int, room: int) -> str:
    """Names the measured situation: model, software, device, how steps run, and how much room there was."""
    known = {
        "form": FORM,
        "config": json.loads(json.dumps(config, default=str)),
        "versions": [__version__, *(version(name) for name in ("mlx", "mlx-lm"))],
        "device": {k: v for k, v in mx.device_info().items() if k not in ("free_memory", "uuid")},
        "mode": mode,
        "pipelined": pipelined,
        "longest_chunk": longest_chunk,
        "room": room.bit_length(),
        "preload": "openblas" in os.environ.get("LD_PRELOAD", ""),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load(key: str) -> Transient | None:
    """The scalars stored under `key`, or None."""
    try:
        stored = msgspec.json.decode(_path(key).read_bytes(), type=_Profile)
    except (OSError, ValueError):
        return None
    return Transient(**structs.asdict(stored))


def save(key: str, transient: Transient) -> None:
    """Store the scalars; readers see the old file or the whole new one."""
    path = _path(key)
    assert isinstance(transient.chunk, Curve)
    text = msgspec.json.encode(transient)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder, path.name)
            new.write_bytes(text)
            os.replace(new, path)


class _Profile(msgspec.Struct, frozen=True):
    chunk: Curve
    step: Scalars
    usual_draw: int
    costly_draw: int
    lean_draw: int
    constants: int


def _path(key: str) -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "penstock" / "profiles" / f"{key}.json"
