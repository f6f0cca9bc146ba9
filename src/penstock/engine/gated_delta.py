"""The gated delta rule by chunks: recurrent layers' prefill and training without a token loop.

Owns the matmul form of the recurrence that Qwen3.5, Qwen3-Next and their kin use, for devices
without mlx-lm's Metal kernel. mlx-lm's fallback there is a Python loop over the tokens, which
records one state of (value heads x value dim x key dim) per token until it is evaluated; this form
holds one state per chunk and work arrays of (chunk x chunk) per head.
Refuses nothing: vector gates, masks and short runs (decode) go to mlx-lm's own path.
Invariant: same results as ``mlx_lm.models.gated_delta.gated_delta_ops`` to about 1e-5 in float32.

Source of the formula: Yang, Kautz and Hatamizadeh, 'Gated Delta Networks: Improving Mamba2 with
Delta Rule', 2024, arXiv 2412.06464, section 3.3 (the WY form with decay), derived here as follows.
Per head, with decay g, write strength beta, key k, value v and query q of token t:

    S_t = g_t S_{t-1} + u_t k_t^T        u_t = beta_t (v_t - g_t S_{t-1} k_t)        y_t = S_t q_t

In a chunk that starts from the state S, let D_ij = g_{j+1} ... g_i for i >= j, d_i = g_1 ... g_i.
Putting the first equation into the second gives a unit lower triangular system for all u at once:

    (I + A) U = diag(beta) (V - diag(d) K S^T)     A_ij = beta_i D_ij k_i.k_j  for i > j, else 0
    Y = diag(d) Q S^T + (D * Q K^T, i >= j) U      S' = d_C S + U^T diag(D_C.) K
"""

import functools
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm_gated_delta

CHUNK = 64
"""Tokens per chunk: the triangular system's size."""

GROUP = 8
"""Chunks prepared together: wide batches for the device, work arrays that don't grow with the prompt."""

THRESHOLD = 16
"""Runs shorter than this many tokens use mlx-lm's loop (decode, speculative verification)."""

_TINY = 1e-37
"""A decay is taken as at least this (a normal float32), so that its logarithm is finite."""

_BASE = 8
"""Largest block inverted by powers: their binomial growth (35 for 8) stays harmless in float32."""

Ops = Callable[..., tuple[mx.array, mx.array]]

_original: Ops = mlx_lm_gated_delta.gated_delta_ops


def gated_delta_chunked(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Run the gated delta rule over T tokens; a drop-in for mlx-lm's ``gated_delta_ops``.

    Shapes: q, k (B, T, Hk, Dk); v (B, T, Hv, Dv), Hv a multiple of Hk; g in (0, 1] and beta
    (B, T, Hv); state (B, Hv, Dv, Dk) or None for zeros. Returns y (B, T, Hv, Dv) in q's dtype and
    the state after the last token in the incoming state's dtype (float32 if None). Computed in
    float32. A vector gate (B, T, Hv, Dk), a mask, or T < ``THRESHOLD`` delegates to mlx-lm.
    """
    tokens = q.shape[1]
    if mask is not None or g.ndim != 3 or tokens < THRESHOLD:
        return _original(q, k, v, g, beta, state, mask)
    batch, _, value_heads, value_dim = v.shape
    shape = (batch, value_heads, value_dim, k.shape[-1])
    state_dtype = mx.float32 if state is None else state.dtype
    current = mx.zeros(shape) if state is None else state.astype(mx.float32)
    outputs = []
    for start in range(0, tokens, CHUNK * GROUP):
        part = slice(start, start + CHUNK * GROUP)
        y, current = _group(q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], current)
        outputs.append(y.astype(q.dtype))
    y = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    return y, current.astype(state_dtype)


def install() -> None:
    """Make mlx-lm's ``gated_delta_update`` fall back to the chunked form; safe to call repeatedly.

    ``gated_delta_update`` finds ``gated_delta_ops`` in its own module's globals at each call, so this
    one name is the seam, also for model files that imported ``gated_delta_update`` before.
    """
    mlx_lm_gated_delta.gated_delta_ops = gated_delta_chunked


def _group(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Up to ``GROUP`` chunks: all state-free work in wide batches, then one short step per chunk."""
    batch, tokens, value_heads, value_dim = v.shape
    chunk = min(CHUNK, tokens)
    repeat = value_heads // q.shape[2]
    q, k, v = (_by_chunk(x, chunk) for x in (q, k, v))
    if repeat > 1:
        q, k = (mx.repeat(x, repeat, axis=1) for x in (q, k))
    # A padding token has decay 1 and strength 0: it leaves the state as it is.
    g = _by_chunk(g[..., None], chunk, fill=1.0)[..., 0]
    beta = _by_chunk(beta[..., None], chunk)

    decay = _decay_products(g)
    from_start = mx.cumsum(mx.log(mx.maximum(g, _TINY)), axis=-1)
    from_start = mx.exp(from_start)[..., None]
    keys_t = k.swapaxes(-1, -2)
    inverse = _unit_lower_inverse(mx.tril(beta * decay * (k @ keys_t), -1))
    fresh = inverse @ (beta * v)
    erased = inverse @ (beta * from_start * k)
    within = decay * (q @ keys_t)
    queries = from_start * q
    to_end = decay[..., -1, :, None] * k
    end = from_start[..., -1:, :]

    outputs = []
    for n in range(q.shape[2]):
        written = fresh[:, :, n] - erased[:, :, n] @ state.swapaxes(-1, -2)
        outputs.append(queries[:, :, n] @ state.swapaxes(-1, -2) + within[:, :, n] @ written)
        state = end[:, :, n] * state + written.swapaxes(-1, -2) @ to_end[:, :, n]
    y = mx.stack(outputs, axis=2).reshape(batch, value_heads, -1, value_dim)
    return y[:, :, :tokens].swapaxes(1, 2), state


def _by_chunk(x: mx.array, chunk: int, fill: float = 0.0) -> mx.array:
    """(B, T, H, D) in any dtype to (B, H, chunks, chunk, D) in float32, the last chunk filled up."""
    batch, tokens, heads, dim = x.shape
    x = x.astype(mx.float32)
    if missing := -tokens % chunk:
        x = mx.concatenate([x, mx.full((batch, missing, heads, dim), fill)], axis=1)
    return x.reshape(batch, -1, chunk, heads, dim).transpose(0, 3, 1, 2, 4)


def _decay_products(g: mx.array) -> mx.array:
    """D_ij = g_{j+1} ... g_i for i >= j, else 0: (..., C) to (..., C, C).

    Each entry sums its own logarithms. The difference of two running sums would be cheaper, but
    after one strong decay it cancels: e^(-5000.1 + 5000) keeps three digits in float32.
    """
    size = g.shape[-1]
    logs = mx.log(mx.maximum(g, _TINY))[..., None]
    sums = mx.cumsum(mx.tril(mx.broadcast_to(logs, (*g.shape, size)), -1), axis=-2)
    return mx.tril(mx.exp(sums))


def _unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + a)^-1 of strictly lower triangular a, (..., C, C).

    Blocks of ``_BASE`` on the diagonal by the product (I - a)(I + a^2)(I + a^4), then pairs of
    neighbours merged, doubling the size: with X the inverse of the two blocks and b what lies
    below them, (X^-1 + b)^-1 = X - X b X. The product alone would do for the whole matrix, but
    for 64 equal keys the powers reach 10^18 where the inverse holds ones.
    """
    size = a.shape[-1]
    lower = a * _block_mask(size, _BASE)
    inverse = mx.eye(size) - lower
    power = lower
    reached = 2
    while reached < min(size, _BASE):
        power = power @ power
        inverse = inverse + inverse @ power
        reached *= 2
    block = _BASE
    while block < size:
        below = a * (_block_mask(size, 2 * block) - _block_mask(size, block))
        inverse = inverse - inverse @ below @ inverse
        block *= 2
    return inverse


@functools.lru_cache(maxsize=8)  # one chunk length's, twice over: they would add up over all lengths
def _block_mask(size: int, block: int) -> mx.array:
    """Ones where row and column lie in the same diagonal block, (size, size) float32."""
    index = mx.arange(size) // block
    mask = (index[:, None] == index[None, :]).astype(mx.float32)
    mx.eval(mask)
    return mask
