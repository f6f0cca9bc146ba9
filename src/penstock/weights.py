"""How large a model's weights are, from the headers of its safetensors files: nothing is loaded.

A safetensors file begins with the length of a JSON header (uint64, little-endian) that names every tensor's
dtype, shape and place. Refuses a header longer than the format's own bound, so a damaged file costs nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_HEADER = 100_000_000
"""Bytes; the bound that the format's own library sets."""
_HALF = ("F16", "BF16")


class WeightsError(ValueError):
    """A file is not a whole safetensors file. One sentence says which."""


def header(path: Path) -> dict[str, Any]:
    """The tensors of a file: name to {dtype, shape, data_offsets}. Raises WeightsError, OSError."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= MAX_HEADER:
            raise WeightsError(f"{path} is no safetensors file.")
        try:
            found = json.loads(file.read(size))
        except ValueError:
            found = None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} has a damaged header.")
    found.pop("__metadata__", None)
    return found


def check(path: Path) -> int:
    """Bytes of a file that holds all that its header names. Raises WeightsError, OSError."""
    try:
        end = max((int(tensor["data_offsets"][1]) for tensor in header(path).values()), default=0)
    except (LookupError, TypeError):
        raise WeightsError(f"{path} has a damaged header.") from None
    with path.open("rb") as file:
        needed = 8 + int.from_bytes(file.read(8), "little") + end
    if (size := path.stat().st_size) < needed:
        raise WeightsError(f"{path} is cut off: {size:,} bytes of {needed:,}.")
    return size


def resident(headers: Mapping[str, Any], *, widened: bool) -> int:
    """Bytes that the tensors take when loaded; `widened`: half precision becomes float32, as on CPUs."""
    sizes = ((tensor["dtype"], *tensor["data_offsets"]) for tensor in headers.values())
    return sum((end - start) * (2 if widened and dtype in _HALF else 1) for dtype, start, end in sizes)


def main_dtype(headers: Mapping[str, Any]) -> str:
    """What the model computes in, by the name MLX gives it: the float type of most tensors."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    counts = Counter(names[tensor["dtype"]] for tensor in headers.values() if tensor["dtype"] in names)
    return counts.most_common(1)[0][0] if counts else "bfloat16"


def size(directory: Path, *, widened: bool) -> int:
    """Bytes of all weights in a model directory. Raises WeightsError, OSError."""
    return sum(
        resident(header(path), widened=widened) for path in sorted(directory.glob("model*.safetensors"))
    )
