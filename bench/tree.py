"""The prefix tree at 10^6 ids and 10^4 segments: times of match, insert and evict. `python -m bench.tree`."""

from __future__ import annotations

import random
import statistics
import time
from array import array
from collections.abc import Callable

from penstock.cache.tree import Tree

IDS, SEGMENTS, SHARED = 1_000_000, 10_000, 20_000


def build(rng: random.Random) -> tuple[Tree, list[array[int]]]:
    """Sequences of about 60,000 ids on a shared prefix, in segments of 100 ids."""
    tree = Tree()
    shared = ids(rng, SHARED)
    sequences = []
    while tree.tokens < IDS:
        sequence = shared + ids(rng, 40_000)
        keep(tree, sequence, IDS // SEGMENTS)
        sequences.append(sequence)
    return tree, sequences


def ids(rng: random.Random, count: int) -> array[int]:
    return array("I", rng.choices(range(150_000), k=count))


def keep(tree: Tree, sequence: array[int], step: int = 512) -> None:
    """What a row that ends does: its ids are there, and what nobody had becomes segments."""
    row = tree.lend("", None)
    assert tree.extend(row, sequence, 0) is None
    start = tree.unpacked(row)[0][0]
    tree.drop(row, 0, [(None, min(step, len(sequence) - at), 1) for at in range(start, len(sequence), step)])


def timed(name: str, call: Callable[[int], object], times: int = 50) -> None:
    taken = []
    for index in range(times):
        began = time.perf_counter()
        call(index)
        taken.append((time.perf_counter() - began) * 1e3)
    print(f"{name:<58} median {statistics.median(taken):6.3f} ms   worst {max(taken):6.3f} ms")


def main() -> None:
    rng = random.Random(1)
    tree, sequences = build(rng)
    count = sum(len(node.segments) for root in tree._roots.values() for node in root.children.values())
    count += sum(len(leaf.segments) for leaf in tree._leaves)
    print(f"{tree.tokens:,} ids, {count:,} segments, {tree.entries} sequences")
    timed("match of 60,000 ids, whole", lambda i: tree.match("", sequences[i % len(sequences)]))
    timed("the same with its pieces", lambda i: tree.pieces(tree.match("", sequences[i % len(sequences)])))
    parted = [sequence[:50_000] + ids(rng, 10_000) for sequence in sequences]
    timed("match of 60,000 ids, parted at 50,000", lambda i: tree.match("", parted[i % len(parted)]))
    longer = [sequence + ids(rng, 1_089) for sequence in sequences]
    timed("insert of a turn of 1,089 ids after 60,000", lambda i: keep(tree, longer[i]), len(longer))
    fresh = [ids(rng, 60_000) for _ in range(20)]
    timed("insert of 60,000 new ids", lambda i: keep(tree, fresh[i]), len(fresh))
    timed("insert that splits at 50,000", lambda i: keep(tree, parted[i]), len(parted))
    one = Tree()
    million = ids(rng, IDS)
    timed("insert of 1,000,000 ids at once, 10,000 segments", lambda i: keep(one, million, 100), 1)
    timed("match of 1,000,000 ids, whole", lambda i: one.match("", million), 20)
    row = tree.lend("", None)
    tree.extend(row, sequences[0], 0)
    timed("a row's step: one more id", lambda i: tree.extend(row, array("I", [i]), 0), 1_000)
    timed("evict one segment", lambda i: tree.evict(1, 1))
    timed("evict half of the bytes", lambda i: tree.evict(tree.bytes // 2, 1), 1)


if __name__ == "__main__":
    main()
