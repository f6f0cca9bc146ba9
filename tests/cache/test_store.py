"""Restored rows compute what the original would have, whatever the layers; with positive controls."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest
from tests.support import tiny_models

from penstock.cache import store
from penstock.cache.store import Part
from penstock.engine.batch import Runner
from penstock.engine.rows import Row

NAMES = ["qwen3", "qwen3_5", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2", "llama"]
CUTS = [13, 40, 97]
IDS = random.Random(4).choices(range(256), k=140)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=NAMES)
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(tiny_models.build(request.param))


def prefilled(runner: Runner, upto: int, snaps: dict[int, store.Snapshot] | None = None) -> Row:
    row = runner.open(200)
    edges = [*(c for c in CUTS if c < upto), upto]
    for start, end in zip([0, *edges], edges, strict=False):
        mx.eval(runner.prefill(row, IDS[start:end]))
        if snaps is not None:
            snaps[end] = store.snapshot(row, end)
    return row


def logprobs(runner: Runner, row: Row, start: int) -> mx.array:
    """Log-probabilities (n, V) under the forced ids from `start` on: a chunk, then single steps."""
    mx.eval(runner.prefill(row, IDS[start : start + 7]))
    steps = []
    for id_ in IDS[start + 7 : start + 12]:
        logits = runner.decode([row], mx.array([id_], mx.int32))
        steps.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return mx.concatenate(steps)


def segments(runner: Runner, row: Row, upto: int, size: int = 32) -> list[Part]:
    packed = [store.pack(row, at, min(size, upto - at)) for at in range(0, upto, size)]
    return [Part(segment, 0, segment.count) for segment in packed]


def restored(runner: Runner, parts: list[Part], taken: store.Snapshot, capacity: int = 200) -> Row:
    row = runner.open(capacity)
    store.assemble(row, [store.run(part) for part in parts])
    store.restore(row, taken)
    return row


def difference(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max())


def test_a_restored_prefix_continues_as_the_original(runner: Runner) -> None:
    snaps: dict[int, store.Snapshot] = {}
    original = prefilled(runner, 97, snaps)
    expected = logprobs(runner, prefilled(runner, 97), 97)
    parts = segments(runner, original, 97)
    assert difference(logprobs(runner, restored(runner, parts, snaps[97]), 97), expected) <= TOLERANCE
    if parts and runner.open(1).kv:
        split = store.cut(parts[1].source, 11)  # type: ignore[arg-type]
        parts[1:2] = [Part(piece, 0, piece.count) for piece in split]
        lent = [*parts[:2], Part(original, 43, 97 - 43)]  # the rest read from the live row
        assert difference(logprobs(runner, restored(runner, lent, snaps[97]), 97), expected) <= TOLERANCE
    runner.reset()


def test_a_part_of_a_segment_is_enough(runner: Runner) -> None:
    snaps: dict[int, store.Snapshot] = {}
    original = prefilled(runner, 97, snaps)
    expected = logprobs(runner, prefilled(runner, 40), 40)
    parts = segments(runner, original, 97, size=64)
    first = [Part(parts[0].source, 0, 40)]
    assert difference(logprobs(runner, restored(runner, first, snaps[40]), 40), expected) <= TOLERANCE
    runner.reset()


def test_wrong_restores_are_far_off(runner: Runner) -> None:
    """Positive controls: a snapshot one position late, and one segment of another conversation.

    (Two segments of the same conversation in the wrong order would be no control: keys carry their positions,
    and attention does not mind the order.)
    """
    snaps: dict[int, store.Snapshot] = {}
    original = prefilled(runner, 97, snaps)
    expected = logprobs(runner, prefilled(runner, 97), 97)
    parts = segments(runner, original, 97)
    if store.needs_snapshots(original):
        mx.eval(runner.prefill(original, IDS[97:98]))
        late = store.snapshot(original, 97)
        assert difference(logprobs(runner, restored(runner, parts, late), 97), expected) > 10 * TOLERANCE
    if original.kv:
        stranger = runner.open(200)
        mx.eval(runner.prefill(stranger, [255 - id_ for id_ in IDS[:97]]))
        swapped = [parts[0], *segments(runner, stranger, 97)[1:2], *parts[2:]]
        assert (
            difference(logprobs(runner, restored(runner, swapped, snaps[97]), 97), expected) > 10 * TOLERANCE
        )
    runner.reset()


def test_what_is_kept_owns_its_bytes_and_few_buffers() -> None:
    runner = Runner(tiny_models.build("qwen3_5"))
    row = runner.open(4000)
    mx.eval(runner.prefill(row, IDS * 10))
    segment = store.pack(row, 0, 512)
    taken = store.snapshot(row, row.length)
    per_token = sum(int(leaf.keys.nbytes + leaf.values.nbytes) for leaf in row.kv) // 4000
    runner.close(row)
    del row
    mx.clear_cache()
    assert segment.size <= 512 * per_token * 1.05
    assert int(mx.get_array_buffer_size(segment.arrays)) == segment.size
    assert len(segment.arrays) <= 2
    assert taken.size > 0


@pytest.mark.parametrize("moved", [False, True])
def test_a_row_takes_over_what_nobody_else_holds_a_layer_at_a_time(moved: bool) -> None:
    """Whether a segment has its layers together, as it is packed, or apart, as it is moved."""
    runner = Runner(tiny_models.make(tiny_models.config_of("qwen3", num_hidden_layers=12)))
    source = runner.open(2_000)
    mx.eval(runner.prefill(source, [at % 200 for at in range(2_000)]))
    ids = range(0, 2_000, 200)
    if moved:
        made = store.move(source, [(at, 200) for at in ids])
    else:
        made = [store.pack(source, at, 200) for at in ids]
    runner.close(source)
    limit = mx.set_cache_limit(0)
    row, before = runner.open(2_000), mx.get_active_memory()
    runs = [store.run(Part(segment, 0, segment.count)) for segment in made]
    packed = sum(segment.size for segment in made)
    del made
    mx.reset_peak_memory()
    store.separate(runs)
    store.assemble(row, runs)
    assert mx.get_peak_memory() - before <= packed / 10 + 400_000, "a segment or a layer of it, and pages"
    assert mx.get_active_memory() - before <= 400_000
    mx.set_cache_limit(limit)
    runner.close(row)


def test_a_row_is_written_in_place_after_it_was_read() -> None:
    runner = Runner(tiny_models.build("qwen3"))
    row = runner.open(4000)
    mx.eval(runner.prefill(row, IDS))
    lender = [Part(row, 0, 100)]
    other = runner.open(200)
    store.assemble(other, [store.run(part) for part in lender])
    store.pack(row, 0, 100)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(runner.decode([row], mx.array([1], mx.int32)))
    grown = mx.get_peak_memory() - before
    assert grown < row.kv[0].keys.nbytes, "a layer's buffer was copied"
    runner.reset()


def test_a_row_is_assembled_in_no_more_than_its_own_bytes() -> None:
    """Whatever part of it comes from the cache: it was leased, and nothing else was."""
    runner = Runner(tiny_models.build("qwen3"))
    parts = segments(runner, prefilled(runner, 100), 100)
    limit = mx.set_cache_limit(0)
    for used in (parts[:1], parts):
        row = runner.open(4000)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        store.assemble(row, [store.run(part) for part in used])
        assert mx.get_peak_memory() - held <= runner.row_bytes(row) + 16_384
        runner.close(row)
    mx.set_cache_limit(limit)
