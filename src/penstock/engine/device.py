"""What computes here, as MLX tells it: the back end, the device's name and limit, what this process holds.

Facts only; what follows from them is the budget's. Asking starts MLX.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import tempfile

import mlx.core as mx

from penstock import wire
from penstock.engine import lean
from penstock.memory.probe import system_probe

RESERVED_MEM_CURRENT = 5
"""CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT of the CUDA driver's API."""
WARM_UP = 768
"""Side of a matrix product that OpenBLAS spreads over threads, each with buffers of 128 MB that it keeps."""


def facts() -> wire.Device:
    """The device, before anything is loaded."""
    _warm_up()
    info = mx.device_info()
    limits = {"metal": "max_recommended_working_set_size", "cuda": "free_memory"}
    limit = info.get(limits.get(backend(), ""))
    used = system_probe().read(os.getpid()).private or 0
    return wire.Device(backend(), name(), None if limit is None else int(limit), used)


def free() -> int | None:
    """Bytes that a device with memory of its own has left for anybody (CUDA); None elsewhere."""
    return int(mx.device_info()["free_memory"]) if backend() == "cuda" else None


def held() -> int:
    """Bytes of such a device that this process has: at least MLX's count, its driver may keep more."""
    pool, kept = ctypes.c_void_p(), ctypes.c_uint64(0)
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuDeviceGetDefaultMemPool(ctypes.byref(pool), 0) == 0:
            driver.cuMemPoolGetAttribute(pool, RESERVED_MEM_CURRENT, ctypes.byref(kept))
    return max(kept.value, int(mx.get_active_memory() + mx.get_cache_memory()))


def backend() -> str:
    """metal, cuda or cpu."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.default_device() == mx.Device(mx.gpu, 0) else "cpu"


def page(of: str | None = None) -> int:
    """To a multiple of how many bytes MLX's allocator rounds up; `of`: another back end than this one."""
    return 1 if (of or backend()) == "cpu" else 16_384


def name() -> str:
    """The device's name, for people."""
    return str(mx.device_info().get("device_name") or platform.machine())


def _warm_up() -> None:
    """Let what lives as long as the process come to be, so that it is counted.

    MLX's threads, those that read weights among them, BLAS's buffers, and the code that builds models.
    """
    lean.utils()
    mx.set_cache_limit(0)
    side = mx.ones((WARM_UP, WARM_UP))
    mx.eval(side @ side)
    # On a full disk they come to be later, uncounted.
    with contextlib.suppress(OSError, RuntimeError), tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "warm.safetensors")
        mx.save_safetensors(file, {"x": side[0]})
        mx.eval(mx.load(file))
    mx.clear_cache()
