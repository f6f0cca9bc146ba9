"""The chunked gated delta rule against mlx-lm's token loop: same numbers, far less memory."""

from collections.abc import Iterator

import mlx.core as mx
import mlx_lm.models.gated_delta as mlx_lm_gated_delta
import pytest

from penstock.engine import gated_delta

TOLERANCE = 1e-4
Inputs = tuple[mx.array, mx.array, mx.array, mx.array, mx.array]

reference = gated_delta._original


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave mlx-lm's function as it was."""
    before = mlx_lm_gated_delta.gated_delta_ops
    yield
    mlx_lm_gated_delta.gated_delta_ops = before


def inputs(
    tokens: int, *, decay: float = 0.5, key_heads: int = 2, value_heads: int = 4, same_key: bool = False
) -> Inputs:
    """Random q, k, v, g, beta of batch 2, dims 32 and 48; ``decay`` scales -log g."""
    mx.random.seed(tokens)
    q, k = (unit(mx.random.normal((2, tokens, key_heads, 32))) for _ in range(2))
    if same_key:
        k = mx.broadcast_to(k[:, :1], k.shape)
    v = mx.random.normal((2, tokens, value_heads, 48))
    g = mx.exp(-decay * mx.abs(mx.random.normal((2, tokens, value_heads))))
    beta = mx.sigmoid(3 * mx.random.normal((2, tokens, value_heads)))
    return q, k, v, g, beta


def unit(x: mx.array) -> mx.array:
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def worst(one: tuple[mx.array, mx.array], other: tuple[mx.array, mx.array]) -> float:
    """The largest difference of the outputs and the states."""
    return max(float(mx.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("tokens", [16, 40, 64, 65, 200, 600])
def test_equals_the_token_loop(tokens: int) -> None:
    given = inputs(tokens)
    state = mx.random.normal((2, 4, 48, 32))
    assert worst(gated_delta.gated_delta_chunked(*given, state), reference(*given, state)) < TOLERANCE


@pytest.mark.parametrize("decay", [0.0, 1e-3, 30.0, 1000.0])
@pytest.mark.parametrize("same_key", [False, True])
def test_equals_the_token_loop_at_extreme_decays(decay: float, same_key: bool) -> None:
    given = inputs(150, decay=decay, same_key=same_key)
    assert worst(gated_delta.gated_delta_chunked(*given), reference(*given)) < TOLERANCE


def test_weak_decay_after_a_strong_one_keeps_its_digits() -> None:
    q, k, v, g, beta = inputs(64)
    g = mx.where(mx.arange(64)[:, None] < 40, 1e-36, 0.999) * mx.ones_like(g)
    assert worst(gated_delta.gated_delta_chunked(q, k, v, g, beta), reference(q, k, v, g, beta)) < TOLERANCE


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 1), (4, 4), (1, 6), (2, 8)])
def test_equals_the_token_loop_for_grouped_heads(key_heads: int, value_heads: int) -> None:
    given = inputs(90, key_heads=key_heads, value_heads=value_heads)
    assert worst(gated_delta.gated_delta_chunked(*given), reference(*given)) < TOLERANCE


def test_positive_control_a_position_off_by_one_is_seen() -> None:
    q, k, v, g, beta = inputs(100)
    shifted = mx.roll(g, 1, axis=1)
    difference = worst(gated_delta.gated_delta_chunked(q, k, v, shifted, beta), reference(q, k, v, g, beta))
    assert difference > 10 * TOLERANCE


def test_positive_control_a_state_of_the_wrong_row_is_seen() -> None:
    given = inputs(100, decay=0.001)
    state = mx.random.normal((2, 4, 48, 32))
    difference = worst(gated_delta.gated_delta_chunked(*given, state[::-1]), reference(*given, state))
    assert difference > 10 * TOLERANCE


def test_two_runs_in_sequence_equal_one() -> None:
    given = inputs(180)
    y, state = gated_delta.gated_delta_chunked(*given)
    first, middle = gated_delta.gated_delta_chunked(*(x[:, :77] for x in given))
    second, last = gated_delta.gated_delta_chunked(*(x[:, 77:] for x in given), middle)
    assert worst((mx.concatenate([first, second], axis=1), last), (y, state)) < TOLERANCE


def test_types_are_those_of_mlx_lm() -> None:
    q, k, v, g, beta = inputs(80)
    half = (q.astype(mx.bfloat16), k.astype(mx.bfloat16), v.astype(mx.bfloat16), g, beta)
    y, state = gated_delta.gated_delta_chunked(*half)
    expected_y, expected_state = reference(*half)
    assert (y.dtype, state.dtype) == (expected_y.dtype, expected_state.dtype)
    assert (y.shape, state.shape) == (expected_y.shape, expected_state.shape)
    assert float(mx.abs(y.astype(mx.float32) - expected_y.astype(mx.float32)).max()) < 0.05


def test_delegates_masks_vector_gates_and_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gated_delta, "_original", lambda *given: asked.append(given) or reference(*given))
    q, k, v, g, beta = inputs(20)
    gated_delta.gated_delta_chunked(q, k, v, g, beta, None, mx.ones((2, 20), dtype=mx.bool_))
    gated_delta.gated_delta_chunked(q, k, v, mx.broadcast_to(g[..., None], (2, 20, 4, 32)), beta)
    gated_delta.gated_delta_chunked(q[:, :1], k[:, :1], v[:, :1], g[:, :1], beta[:, :1])
    assert len(asked) == 3


def test_gradient_is_finite_and_right() -> None:
    given = inputs(100, decay=20.0)

    def energy(ops: gated_delta.Ops) -> list[mx.array]:
        def loss(*arrays: mx.array) -> mx.array:
            y, state = ops(*arrays)
            return y.square().sum() + state.square().sum()

        return list(mx.grad(loss, argnums=(0, 1, 2, 3, 4))(*given))

    for ours, theirs in zip(energy(gated_delta.gated_delta_chunked), energy(reference), strict=True):
        assert bool(mx.isfinite(ours).all())
        # A decay near zero is held at a floor, where the loop's gradient goes on: compare the others.
        usable = mx.ones_like(ours) if ours.shape != given[3].shape else given[3] > 1e-30
        assert float((mx.abs(ours - theirs) * usable).max()) < 1e-3 * float(mx.abs(theirs).max())


def test_memory_is_far_below_one_state_per_token() -> None:
    tokens, heads, size = 1024, 2, 128
    mx.random.seed(0)
    q, k, v = (unit(mx.random.normal((1, tokens, heads, size))) for _ in range(3))
    g, beta = (mx.random.uniform(0.5, 1, (1, tokens, heads)) for _ in range(2))
    mx.eval(q, k, v, g, beta)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(gated_delta.gated_delta_chunked(q, k, v, g, beta))
    states = tokens * heads * size * size * 4
    assert mx.get_peak_memory() - before < states / 8


def test_install_is_idempotent_and_reaches_gated_delta_update(monkeypatch: pytest.MonkeyPatch) -> None:
    gated_delta.install()
    gated_delta.install()
    assert mlx_lm_gated_delta.gated_delta_ops is gated_delta.gated_delta_chunked
    q, k, v, _, _ = inputs(70)
    a, b = mx.random.normal((2, 70, 4)), mx.random.normal((2, 70, 4))
    weights = mx.zeros(4), mx.zeros(4)
    ours = mlx_lm_gated_delta.gated_delta_update(q, k, v, a, b, *weights, use_kernel=False)
    monkeypatch.setattr(mlx_lm_gated_delta, "gated_delta_ops", reference)
    theirs = mlx_lm_gated_delta.gated_delta_update(q, k, v, a, b, *weights, use_kernel=False)
    assert 0 < worst(ours, theirs) < TOLERANCE
