"""The sampler against mlx-lm's own: the ids that can be drawn, how often they are, and what is reported."""

import math
import random
from array import array

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    make_logits_processors,
    make_sampler,
)

from penstock.engine import sampler
from penstock.engine.sampler import SamplingBatch, sample
from penstock.wire import Sampling

NEVER = -float("inf")
BLOCKS = 20_000  # wide enough that top ids are looked for in blocks, and no multiple of a block
QWEN = 151_936


def draw(logits, rows, *, positions=None, special=(), history=None, inputs=None, excluded=None):
    batch = SamplingBatch(rows, logits.shape[-1], special)
    count = len(rows)
    inputs = mx.zeros((count,), dtype=mx.int32) if inputs is None else inputs
    history = history or [array("I")] * count
    return sample(logits, batch, positions or [0] * count, history, inputs, excluded=excluded)


def our_support(logits, row, special):
    """(V,) bool: ids with a weight above 0 for one row (1, V)."""
    batch = SamplingBatch([row], logits.shape[-1], special)
    [group] = batch.groups
    if group.path != "narrow":
        return (sampler._weights(logits.astype(mx.float32), group, [0], batch.spared) > 0)[0]
    ids = sampler._top_ids(logits, batch.candidates)
    found = mx.zeros((logits.shape[-1],), dtype=mx.bool_)
    found[ids[0]] = (sampler._narrow_weights(logits, ids, group) > 0)[0]
    return found


def their_support(logits, row, special):
    """The same by mlx-lm's filters, in the order of its `make_sampler`."""
    x = logits.astype(mx.float32)
    x = x - mx.logsumexp(x, axis=-1, keepdims=True)
    if 0 < row.top_p < 1:
        x = apply_top_p(x, row.top_p)
    if row.min_p:
        x = apply_min_p(x, row.min_p)
    if row.xtc_probability:
        x = apply_xtc(x, row.xtc_probability, row.xtc_threshold, list(special))
    if row.top_k:
        x = apply_top_k(x, row.top_k)
    return (mx.exp((x - x.max()) / row.temperature) > 0)[0]


FILTERS = [
    Sampling(temperature=1),
    Sampling(temperature=1e-3),
    Sampling(temperature=100, top_k=70),
    Sampling(temperature=1, top_p=0.9),
    Sampling(temperature=1, top_p=1e-6),
    Sampling(temperature=1, top_p=0.9999),
    Sampling(temperature=0.3, top_k=1),
    Sampling(temperature=1, top_k=20),
    Sampling(temperature=1, top_k=64, top_p=0.5),
    Sampling(temperature=1, top_k=65),
    Sampling(temperature=1, top_k=90, top_p=0.95, min_p=0.001),
    Sampling(temperature=1, min_p=0.1),
    Sampling(temperature=1, min_p=1.0),
    Sampling(temperature=0.6, top_k=20, top_p=0.8, min_p=0.02),
    Sampling(temperature=1, xtc_probability=1, xtc_threshold=0.02),
    Sampling(temperature=1, xtc_probability=1, xtc_threshold=0.0),
    Sampling(temperature=1, xtc_probability=1, xtc_threshold=0.01, top_p=0.9, top_k=5, min_p=0.01),
]


def hard_logits(width):
    mx.random.seed(width)
    normal = mx.random.normal((1, width)) * 3
    return {
        "normal": normal,
        "peaked": normal * 4,
        "coarse": mx.round(normal),
        "bfloat16": normal.astype(mx.bfloat16),
        "equal": mx.zeros((1, width)),
        "dominating": mx.where(mx.arange(width) == width - 2, 500.0, normal),
        "banned": mx.where(mx.random.uniform(shape=(1, width)) < 0.5, NEVER, normal),
        "one left": mx.where(mx.arange(width) == 7, 0.0, mx.full((1, width), NEVER)),
    }


@pytest.mark.parametrize("row", FILTERS, ids=str)
@pytest.mark.parametrize("width", [100, BLOCKS])
def test_the_ids_that_can_be_drawn_are_mlx_lms(row, width):
    special = (3, 7, width - 2)
    for name, logits in hard_logits(width).items():
        ours, theirs = our_support(logits, row, special), their_support(logits, row, special)
        assert mx.array_equal(ours, theirs), (name, ours.sum().item(), theirs.sum().item())


@pytest.mark.parametrize("row", [FILTERS[i] for i in (3, 8, 9, 13)], ids=str)
def test_the_ids_that_can_be_drawn_are_mlx_lms_in_a_large_vocabulary(row):
    mx.random.seed(4)
    logits = (mx.random.normal((1, QWEN)) * 3).astype(mx.bfloat16)
    assert mx.array_equal(our_support(logits, row, ()), their_support(logits, row, ()))


@pytest.mark.parametrize(
    "row",
    [
        Sampling(temperature=0.8),
        Sampling(temperature=1.5, top_p=0.9),
        Sampling(temperature=0.7, top_k=20, top_p=0.95),
        Sampling(temperature=1, min_p=0.05),
        Sampling(temperature=1, xtc_probability=0.5, xtc_threshold=0.05, top_k=10),
    ],
    ids=str,
)
def test_ids_are_drawn_as_often_as_by_mlx_lm(row):
    count, rows = 20_000, 2000
    mx.random.seed(11)
    logits = mx.random.normal((1, 150)) * 2.5
    batch = SamplingBatch([msgspec.structs.replace(row, seed=seed) for seed in range(rows)], 150)
    wide, inputs, history = mx.broadcast_to(logits, (rows, 150)), mx.zeros((rows,)), [array("I")] * rows
    steps = range(count // rows)
    ours = frequencies([sample(wide, batch, [step] * rows, history, inputs).tokens for step in steps])
    # mlx-lm tosses XTC's coin once a call: half of the ids with it, half without, is what 0.5 means.
    log_probs = mx.broadcast_to(logits - mx.logsumexp(logits, axis=-1, keepdims=True), (count // 2, 150))
    settings = (row.temperature, row.top_p, row.min_p, 1, row.top_k)
    xtc = (1.0 if row.xtc_probability else 0.0, row.xtc_threshold)
    theirs = frequencies([make_sampler(*settings, *xtc)(log_probs), make_sampler(*settings)(log_probs)])
    distance = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / 2
    # Half the sum of the expected |difference| of two frequencies of `count` draws each.
    noise = sum(math.sqrt(p * (1 - p) / count / math.pi) for p in theirs)
    assert distance < 1.3 * noise, (distance, noise)


def frequencies(batches):
    ids = mx.concatenate(batches)
    return (mx.zeros((150,)).at[ids].add(1) / ids.size).tolist()


def a_crowd(rng, count):
    return [
        Sampling(
            temperature=rng.choice([0.0, 0.5, 1.0, 1.4]),
            top_p=rng.choice([1.0, 1.0, 0.7]),
            top_k=rng.choice([0, 0, 12, 64, 80]),
            min_p=rng.choice([0.0, 0.0, 0.02]),
            xtc_probability=rng.choice([0.0, 0.0, 0.6]),
            xtc_threshold=0.01,
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.0, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.6]),
            frequency_context_size=rng.choice([0, 1, 20]),
            logit_bias=rng.choice([{}, {}, {5: 3.0, 9: NEVER}]),
            logprobs=rng.choice([None, None, 0, 4]),
            seed=rng.randrange(2**62),
            choice=rng.randrange(4),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("key", range(4))
def test_an_id_depends_on_its_row_alone_whatever_the_company(key):
    rng, width, count = random.Random(key), 17_000, 12
    rows = a_crowd(rng, count)
    mx.random.seed(key)
    logits = (mx.random.normal((count, width)) * 3).astype(mx.bfloat16)
    history = [array("I", [rng.randrange(50) for _ in range(rng.randrange(40))]) for _ in rows]
    inputs = [rng.randrange(50) for _ in rows]
    positions = [rng.randrange(9999) for _ in rows]
    excluded = [rng.choice([[], [1, 2]]) for _ in rows]

    def ids(members):
        found = draw(
            logits[mx.array(members)],
            [rows[i] for i in members],
            positions=[positions[i] for i in members],
            special=(7,),
            history=[history[i] for i in members],
            inputs=mx.array([inputs[i] for i in members], dtype=mx.int32),
            excluded=[excluded[i] for i in members],
        )
        return dict(zip(members, found.tokens.tolist(), strict=True))

    together = ids(list(range(count)))
    assert together == ids(rng.sample(range(count), count))
    some = rng.sample(range(count), 5)
    assert {i: together[i] for i in some} == ids(some)
    for i in range(count):
        assert ids([i]) == {i: together[i]}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_greedy_rows_take_the_first_of_the_likeliest(dtype):
    logits = mx.array([[0, 3, 1, 3], [2, 2, 2, 2], [-5, -9, -7, -4]], dtype=dtype)
    found = draw(logits, [Sampling()] * 3)
    assert found.tokens.dtype == mx.int32
    assert found.tokens.tolist() == [1, 0, 3]
    assert found[1:] == (None, None, None)


PROCESSED = [
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.7, repetition_context_size=3),
    Sampling(presence_penalty=0.9, presence_context_size=1),
    Sampling(frequency_penalty=0.4, frequency_context_size=0),
    Sampling(logit_bias={2: 4.5, 11: NEVER, 0: -1.0}),
    Sampling(
        repetition_penalty=1.1,
        repetition_context_size=5,
        presence_penalty=-0.5,
        presence_context_size=7,
        frequency_penalty=0.3,
        frequency_context_size=60,
        logit_bias={4: 2.0},
    ),
    Sampling(repetition_penalty=0.0),
    Sampling(),
]


@pytest.mark.parametrize("length", [0, 1, 4, 50])
def test_penalties_and_biases_are_mlx_lms(length):
    rng, width, count = random.Random(length), 30, len(PROCESSED)
    mx.random.seed(length)
    logits = mx.random.normal((count, width)) * 2
    before = logits.tolist()
    contexts = [[rng.randrange(12) for _ in range(length + 1)] for _ in range(count)]
    newest = mx.array([ids[-1] for ids in contexts], dtype=mx.int32)
    rows = [msgspec.structs.replace(row, logprobs=width) for row in PROCESSED]
    found = draw(logits, rows, history=[ids[:-1] for ids in contexts], inputs=newest)
    assert logits.tolist() == before
    for i, row in enumerate(PROCESSED):
        x = mx.array(before[i])[None]
        for change in make_logits_processors(
            row.logit_bias,
            row.repetition_penalty,
            row.repetition_context_size,
            row.presence_penalty,
            row.presence_context_size,
            row.frequency_penalty,
            row.frequency_context_size,
        ):
            x = change(mx.array(contexts[i]), x)
        expected = (x - mx.logsumexp(x, axis=-1, keepdims=True))[0]
        assert mx.allclose(found.top_logprobs[i], expected[found.top_ids[i]], rtol=0, atol=1e-6), i
        assert found.tokens[i].item() == mx.argmax(expected).item()


def test_log_probabilities_are_those_before_temperature_and_filters():
    mx.random.seed(2)
    logits = mx.random.normal((3, BLOCKS)) * 3
    rows = [
        Sampling(temperature=0.5, top_k=2, seed=1, logprobs=20),
        Sampling(logprobs=0),
        Sampling(temperature=1.5, top_p=0.3),
    ]
    found = draw(logits, rows)
    exact = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for i, id in enumerate(found.tokens.tolist()):
        assert found.logprobs[i].item() == pytest.approx(exact[i, id].item(), abs=1e-5)
    order = mx.argsort(-exact, axis=-1)[:, :20]
    assert found.top_ids.tolist() == order.tolist()
    assert mx.allclose(found.top_logprobs, mx.take_along_axis(exact, order, axis=-1), rtol=0, atol=1e-5)


def test_equals_are_ordered_by_id_whether_blocks_are_searched_or_all():
    mx.random.seed(3)
    logits = mx.round(mx.random.normal((4, BLOCKS)) * 2)
    falling = [sorted(range(BLOCKS), key=lambda id: (-row[id], id)) for row in logits.tolist()]
    for k in (1, 7, 64, 100):
        assert sampler._top_ids(logits, k).tolist() == [ids[:k] for ids in falling]


def test_excluded_ids_are_never_drawn_though_a_bias_asks_for_them():
    logits = mx.array([[0.0, 9, 1, 0], [0.0, 9, 1, 0], [0.0, 9, 1, 0]])
    rows = [Sampling(logit_bias={1: 100.0}), Sampling(temperature=1, seed=3), Sampling()]
    found = draw(logits, rows, excluded=[[1], [1, 2, 0, 99], []])
    assert found.tokens.tolist() == [2, 3, 1]


def test_ids_outside_the_vocabulary_are_ignored():
    row = Sampling(logit_bias={-1: 50.0, 4: 50.0, 2: 1.5}, logprobs=4)
    found = draw(mx.zeros((1, 4)), [row], special=(77,), excluded=[[-2, 4]])
    assert found.top_ids.tolist() == [[2, 0, 1, 3]]


class LargestNumber:
    """Draws the largest number there is, and 0 for XTC so that it acts."""

    def __call__(self, seed, choice, position, purpose):
        return 0.0 if purpose == "xtc" else 1 - 2**-24


@pytest.mark.parametrize("path", [0, 1, 2])
def test_rounding_of_sums_never_draws_an_id_of_no_weight(monkeypatch, path):
    row = [
        Sampling(temperature=1),
        Sampling(temperature=1, top_k=50),
        Sampling(temperature=1, top_p=0.99, xtc_probability=1, xtc_threshold=0.2),
    ][path]
    monkeypatch.setattr(sampler.draws, "uniform", LargestNumber())
    for width in (90, 1000, BLOCKS):
        for name, logits in hard_logits(width).items():
            id = draw(logits, [row]).tokens.item()
            assert our_support(logits, row, ())[id].item(), (name, width, id)


def test_a_sum_that_never_passes_still_draws_an_id_of_positive_weight():
    weights = mx.array([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0]])
    assert sampler._pick(weights, [1.0]).item() in (2, 4)
    assert sampler._pick(weights, [0.0]).item() == 2
    assert sampler._pick(weights, [0.5]).item() == 4


@pytest.mark.parametrize("logits", [[NEVER] * 5, [0.0, float("nan"), 1, 2, 3]])
@pytest.mark.parametrize("row", [Sampling(), *FILTERS[:9:4], Sampling(temperature=1, top_k=3)])
def test_logits_that_allow_nothing_still_give_an_id_of_the_vocabulary(logits, row):
    assert 0 <= draw(mx.array([logits]), [row]).tokens.item() < 5


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e6])
def test_any_temperature_is_a_distribution(temperature):
    found = draw(mx.array([[0.0, 4.0, 3.0, NEVER]]), [Sampling(temperature=temperature, seed=5)])
    assert found.tokens.item() in ((1,) if temperature < 1 else (0, 1, 2))


def test_xtc_acts_as_often_as_it_is_told():
    rows = [Sampling(temperature=1e-3, xtc_probability=0.3, xtc_threshold=0.1, seed=s) for s in range(2000)]
    logits = mx.broadcast_to(mx.array([[1.0, 2.0, 0.0]]), (2000, 3))
    # Left alone the likeliest is drawn; where XTC acts, only the last one above the threshold is left.
    ids = draw(logits, rows).tokens.tolist()
    assert set(ids) == {0, 1} or set(ids) == {0, 1, 2}
    assert 0.26 < 1 - ids.count(1) / 2000 < 0.34


def test_nothing_is_evaluated_while_the_graph_is_built():
    """A step may still be in flight: reading anything of it would wait for it."""

    rows = a_crowd(random.Random(9), 16)
    batch = SamplingBatch(rows, 500)
    tick = mx.zeros((16, 500))
    inputs = mx.argmax(tick + 1, axis=-1).astype(mx.int32)
    mx.eval(tick)
    mx.synchronize()
    active = mx.get_active_memory()
    found = sample(tick, batch, [3] * 16, [array("I", [1, 2, 3])] * 16, inputs, excluded=[[1]] * 16)
    assert mx.get_active_memory() - active < 16 * 500
    assert len(found.tokens.tolist()) == 16
