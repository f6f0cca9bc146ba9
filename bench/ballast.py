"""`python -m bench.ballast GB`: holds a CUDA device's memory until stdin ends, all but GB of what is free.

What is left is then a hard limit from outside for every other program, as a smaller card would be. Plain
allocations of the driver, never managed memory.
"""

from __future__ import annotations

import ctypes
import sys


def main() -> int:
    """Take the memory, say how much is left, and wait."""
    left = int(float(sys.argv[1]) * 1e9)
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, pointer = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for code in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        cuda.cuCtxSetCurrent(context),
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(1, free.value - left))),
        cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
    ):
        if code:
            sys.exit(f"the CUDA driver answers with error {code}")
    print(f"{free.value / 1e9:.2f} of {total.value / 1e9:.2f} GB are left", flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
