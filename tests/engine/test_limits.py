"""The fence around the engine, in a process of its own: it must refuse, and it must let the budget be."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.engine.limits import data_bytes

PROGRAM = """
import sys
import mlx.core as mx
from penstock.engine import limits
mx.set_default_device(mx.cpu)
weights = mx.zeros((8 << 20,))
side = mx.ones((768, 768))
mx.eval(weights, side @ side)
limits.set_pool(0)
limits.fence(300 << 20)
parts = []
for part in range(int(sys.argv[1])):
    parts.append(mx.full((4 << 20,), part))
    mx.eval(parts)
print("done", mx.get_active_memory() >> 20, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts anonymous memory on Linux only")
@pytest.mark.parametrize(("parts", "lives"), [(15, True), (24, False)])
def test_what_is_within_the_ceiling_is_granted_and_what_is_far_beyond_kills(parts: int, lives: bool) -> None:
    """32 MB of weights and 16 MB a part, under a ceiling of 300 MB with an allowance of 64 MB."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(parts)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode == 0) == lives, done.stderr
    assert ("done" in done.stdout) == lives


def test_reads_the_kernels_words() -> None:
    assert data_bytes("Name:\tx\nVmData:\t   2048 kB\nVmStk:\t 1 kB\n") == 2 << 20
    with pytest.raises(ValueError, match="VmData"):
        data_bytes("Name:\tx\n")
