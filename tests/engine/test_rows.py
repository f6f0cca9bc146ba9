"""One row's caches: RowKV against mlx-lm's KVCache, growth, writes in place, states of joining rows."""

import math
from collections.abc import Callable

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine import device
from penstock.engine.rows import Row, RowKV, RowState, RowWindow, StateStack, roomy, unknown
from penstock.memory.costs import GROWTH, grown

from mlx_lm.models.cache import (  # isort: skip - after our package, which makes this import light
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)


def chunk(n: int, heads: int = 2, width: int = 4, seed: int = 0) -> mx.array:
    return mx.random.normal((1, heads, n, width), key=mx.random.key(seed))


@settings(max_examples=20, deadline=None)
@given(
    capacity=st.integers(0, 40),
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=8),
)
def test_row_kv_holds_what_kv_cache_holds(capacity: int, steps: list[int]) -> None:
    ours, theirs = RowKV(capacity), KVCache()
    for seed, n in enumerate(steps):
        keys, values = chunk(n, seed=seed), chunk(n, width=6, seed=seed + 100)
        made = [cache.make_mask(n, return_array=False, window_size=None) for cache in (ours, theirs)]
        assert made == [None if n == 1 else "causal"] * 2
        for mine, other in zip(
            ours.update_and_fetch(keys, values), theirs.update_and_fetch(keys, values), strict=True
        ):
            assert mx.array_equal(mine, other)
        assert ours.offset == ours.size() == theirs.offset
    windows = [cache.make_mask(1, return_array=False, window_size=3) for cache in (ours, theirs)]
    assert mx.array_equal(*windows)


def test_capacity_is_what_was_reserved_and_grows_by_an_eighth() -> None:
    cache = RowKV(100)
    cache.update_and_fetch(chunk(100), chunk(100))
    assert cache.capacity == cache.keys.shape[2] == 100
    cache.update_and_fetch(chunk(1), chunk(1))
    assert cache.capacity == 101 + GROWTH
    assert grown(80_000) == 90_000
    cache.reserve(400)
    assert cache.values.shape[2] == 400
    cache.reserve(10)
    assert cache.capacity == 400


def test_latent_and_rope_may_differ_in_width() -> None:
    cache = RowKV(8)
    keys, values = cache.update_and_fetch(chunk(3, heads=1, width=32), chunk(3, heads=1, width=8))
    assert (keys.shape, values.shape) == ((1, 1, 3, 32), (1, 1, 3, 8))


def peak_of(act: Callable[[], object]) -> int:
    """Bytes that it holds at most beside what was there."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    act()
    mx.synchronize()
    return mx.get_peak_memory() - before


def write(cache: RowKV, times: int = 1) -> None:
    for _ in range(times):
        mx.eval(cache.update_and_fetch(chunk(1, width=64), chunk(1, width=64)))


def test_writes_are_in_place() -> None:
    cache = RowKV(20_000)
    write(cache)
    assert peak_of(lambda: write(cache, 5)) < cache.keys.nbytes / 10


def copied(capacities: range) -> list[int]:
    """Capacities, of rows one after the other in memory that the one before had, whose first write copies."""
    found = []
    mx.clear_cache()
    for capacity in capacities:
        cache = RowKV(capacity)
        if peak_of(lambda cache=cache: write(cache)) > 2.5 * cache.keys.nbytes:
            found.append(capacity)
        del cache
    return found


@pytest.mark.metal
def test_writes_are_in_place_where_the_allocator_gave_more_than_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capacities = range(2_000, 1_900, -1)
    assert copied(capacities) == []
    monkeypatch.setattr(device, "page", lambda: 1)
    assert copied(capacities) != [], "the control: a row that is not whole pages"


@given(
    heads=st.sampled_from([1, 2, 3, 8, 10]),
    width=st.sampled_from([16, 64, 72, 80, 128, 512]),
    dtype=st.sampled_from([mx.bfloat16, mx.float32]),
    capacity=st.integers(1, 5_000),
)
def test_a_buffer_is_whole_pages(heads: int, width: int, dtype: mx.Dtype, capacity: int) -> None:
    like = mx.zeros((1, heads, 1, width), dtype)
    assert roomy(like, capacity).shape == (1, heads, capacity, width), "the CPU's allocator rounds nothing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "page", lambda: 16_384)
        buffer = roomy(like, capacity)
    assert buffer.dtype == dtype
    assert buffer.nbytes % 16_384 == 0
    position = int(like.nbytes)
    assert 0 <= buffer.shape[2] - capacity < math.lcm(16_384, position) // position


def test_keys_and_values_may_have_room_for_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "page", lambda: 16_384)
    cache = RowKV(130)
    cache.update_and_fetch(chunk(100, heads=1, width=512), chunk(100, heads=1, width=64))
    assert (cache.keys.shape[2], cache.values.shape[2], cache.capacity) == (136, 192, 136)
    cache.reserve(136)
    assert cache.keys.shape[2] == 136
    cache.update_and_fetch(chunk(50, heads=1, width=512), chunk(50, heads=1, width=64))
    assert (cache.offset, cache.capacity) == (150, 408)


def test_a_held_view_would_copy_the_row() -> None:
    """The control of the test before: what `keys_and_values` warns of is real, and seen."""
    cache = RowKV(20_000)
    held = [cache.update_and_fetch(chunk(1, width=64), chunk(1, width=64))]
    mx.eval(held)
    assert peak_of(lambda: write(cache)) > cache.keys.nbytes
    del held


def test_growing_a_row_doubles_one_layer_at_a_time() -> None:
    row = Row([KVCache() for _ in range(8)], 5000)
    for cache in row.kv:
        mx.eval(cache.update_and_fetch(chunk(5000, width=16), chunk(5000, width=16)))
    layer = row.kv[0].keys.nbytes + row.kv[0].values.nbytes
    row.length = 5000
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    row.reserve(grown(5001))
    mx.eval(row.arrays())
    growth = sum(array.nbytes for array in row.arrays()) - 8 * layer
    assert mx.get_peak_memory() - before < growth + 2 * layer
    assert {cache.capacity for cache in row.kv} == {grown(5001)}


def test_lists_of_caches_are_owned_and_opened() -> None:
    row = Row([CacheList(ArraysCache(2), KVCache()), RotatingKVCache(8), KVCache()], 30)
    assert [type(leaf) for leaf in row.leaves] == [RowState, RowKV, RowWindow, RowKV]
    assert [cache.capacity for cache in row.kv] == [30, 30]
    assert unknown(row.caches) is None
    assert unknown([CacheList(ChunkedKVCache(8))]) == "ChunkedKVCache"


def with_states(value: float | None) -> Row:
    row = Row([ArraysCache(2), KVCache(), ArraysCache(1)], 0)
    if value is not None:
        for cache in row.states:
            cache.cache = [mx.full((1, 3), value) for _ in cache.cache]
    return row


def values(caches: list[ArraysCache]) -> list[list[list[float]]]:
    return [[array[:, 0].tolist() for array in cache.cache] for cache in caches]


def test_states_stay_stacked_while_the_same_rows_decode() -> None:
    stack, rows = StateStack(), [with_states(1), with_states(2), with_states(3)]
    caches = stack.gather(rows)
    assert values(caches) == [[[1, 2, 3], [1, 2, 3]], [[1, 2, 3]]]
    assert stack.gather(list(rows)) is caches
    assert all(row.arrays() == [] for row in rows)


def test_rows_join_leave_and_return_with_their_own_state() -> None:
    stack, (a, b, c) = StateStack(), (with_states(1), with_states(2), with_states(3))
    stack.gather([a, b])
    for cache in stack.caches:
        cache.cache = [array + 10 for array in cache.cache]
    assert values(stack.gather([c, a])) == [[[3, 11], [3, 11]], [[3, 11]]]
    assert values(b.states) == [[[12], [12]], [[12]]]
    assert values(stack.gather([b, a, c]))[0][0] == [12, 11, 3]
    stack.release([a])
    assert stack.members == ()
    assert [values(row.states)[0][0] for row in (a, b, c)] == [[11], [12], [3]]


def test_a_row_without_state_starts_from_zeros() -> None:
    stack = StateStack()
    assert values(stack.gather([with_states(1), with_states(None)]))[1] == [[1, 0]]
    assert stack.gather([with_states(None), with_states(None)])[0].cache == [None, None]


def test_closed_rows_leave_nothing_in_the_stack() -> None:
    stack, (a, b) = StateStack(), (with_states(1), with_states(2))
    stack.gather([a, b])
    a.close()
    stack.forget(a)
    assert values(stack.gather([b, with_states(5)]))[1] == [[2, 5]]
    for row in stack.members:
        row.close()
        stack.forget(row)
    assert stack.arrays() == []


@pytest.mark.parametrize("kept", [True, False])
def test_states_are_freed_from_the_chunk_they_were_cut_from(kept: bool) -> None:
    row = with_states(None)
    whole = mx.ones((1, 50_000))
    row.states[0].cache = [whole[:, :3], None]
    mx.eval(row.arrays())
    if not kept:
        row.unpin()
        mx.eval(row.arrays())
    assert (mx.get_array_buffer_size(row.arrays()) < 1000) is not kept


def test_a_row_is_looked_at_through_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLX raises a late error just before a step is signalled, a look at its buffers never returns.

    That is a race of microseconds, seen once in some hundred steps that fail; a view is an operation of its
    own, with an end of its own.
    """
    looked = []

    def look(array: mx.array) -> memoryview:
        looked.append(array.size)
        return memoryview(array)

    monkeypatch.setattr("penstock.engine.rows.memoryview", look, raising=False)
    row = Row([KVCache()], 16)
    row.kv[0].update_and_fetch(chunk(3), chunk(3))
    row.settle()
    row.kv[0].update_and_fetch(chunk(1), chunk(1))
    assert row.is_intact
    assert looked == [1] * 4
