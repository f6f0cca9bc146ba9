"""`python -m bench.handover`: what it costs to hold a prefix once: copies into a row and out of it.

A row as Qwen3.5-4B's (32 KiB of keys and values an id, bfloat16, eight layers) is packed into segments, and
another is filled from them, as at the end of a turn and at the start of the next.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from penstock.cache import store
from penstock.cache.tree import SEGMENT
from penstock.engine.rows import Row

LAYERS, HEADS, WIDTH = 8, 4, 256


def timed(call: Callable[[], object], times: int) -> float:
    """Median seconds of processor time, which other work on the machine does not count in."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.handover", description=__doc__)
    parser.add_argument("--ids", type=int, default=16_000)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    row = Row([KVCache() for _ in range(LAYERS)], args.ids + 1_024)
    for leaf in row.kv:
        new = mx.random.normal((1, HEADS, args.ids, WIDTH)).astype(mx.bfloat16)
        leaf.update_and_fetch(new, new)
        mx.eval(leaf.keys, leaf.values)
    starts = range(0, args.ids, SEGMENT)

    def pack() -> list[store.Part]:
        made = [store.pack(row, at, min(SEGMENT, args.ids - at)) for at in starts]
        return [store.Part(segment, 0, segment.count) for segment in made]

    parts = pack()
    size = sum(part.source.size for part in parts if isinstance(part.source, store.Segment))

    def fill() -> None:
        store.assemble(Row([KVCache() for _ in range(LAYERS)], args.ids + 1_024), parts)

    for name, call in (("into a row", fill), ("back into segments", pack)):
        seconds = timed(call, args.times)
        each = f"{seconds * 1e3:.0f} ms, {size / seconds / 1e9:.1f} GB/s"
        print(f"{args.ids:,} ids, {size / 1e9:.2f} GB {name}: {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
