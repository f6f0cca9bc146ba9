"""What the allocator and the system are told to enforce, beside the ledger's arithmetic.

Nothing here makes the promise: the pool's cap is leased, the throttle only keeps work from running ahead, and
the hard limit is the fence for the day when the arithmetic is wrong. With it an allocation too many fails in
this process, which is then started again, and the system does not have to choose a victim.
"""

from __future__ import annotations

import logging
import resource
import sys
from pathlib import Path

import mlx.core as mx

from penstock.sizes import gigabytes

log = logging.getLogger("penstock.engine")

ALLOWANCE = 64 << 20
"""Bytes beside the budget for what is not MLX's: the ids of sequences, messages, the interpreter's heap."""


def set_pool(limit: int) -> None:
    """Cap what the allocator keeps of freed buffers. GPU allocators would give it back at the next use."""
    mx.set_cache_limit(limit)
    if limit == 0:
        mx.clear_cache()


def wire_weights(size: int) -> None:
    """Keep that many bytes resident (Metal; nothing elsewhere). Rows are never wired: churn is what harms."""
    if mx.metal.is_available():
        most = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(min(size, most))


def fence(ceiling: int) -> None:
    """Let the system refuse this process anonymous memory beyond the ceiling, and write no core dump.

    To be called when the model is loaded, every thread runs and nothing is being computed: what is there now,
    MLX's buffers apart, is what the process needs besides. Linux with the CPU back end only; elsewhere it
    says so and does nothing.
    """
    if sys.platform != "linux" or mx.default_device() != mx.Device(mx.cpu, 0):
        log.warning("--hard-memory-limit needs Linux and the CPU back end; it is off")
        return
    limit = (
        data_bytes(Path("/proc/self/status").read_text()) + ceiling - int(mx.get_active_memory()) + ALLOWANCE
    )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    log.info("anonymous memory is limited to %s", gigabytes(limit))


def data_bytes(status: str) -> int:
    """VmData of a /proc/…/status, in bytes. Raises ValueError without it."""
    for line in status.splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmData")
