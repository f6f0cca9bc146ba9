"""What is said of a model before it runs: formulas against known figures, and the plan's arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.memory.costs import FIRST_ROOM, Costs, Fit
from penstock.memory.estimate import Shape, figures, transient, working_set
from penstock.memory.predict import MARGIN, Scalars, Transient

QWEN3_5_4B = {
    "model_type": "qwen3_5",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}
"""The reported model; its recurrent heads as far as they are known."""
SHAPE = Shape.of(QWEN3_5_4B, 248_320, 2)
QWEN3 = Shape.of(
    {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2,
     "head_dim": 64}, 1000, 2
)  # fmt: skip


def test_a_config_is_read_one_level_down_and_guessed_where_it_is_silent() -> None:
    assert (SHAPE.hidden, SHAPE.heads, SHAPE.head_dim, SHAPE.state_heads) == (2560, 16, 256, 32)
    gpt = Shape.of({"n_embd": 768, "n_head": 12, "n_inner": None}, 50_000, 4)
    assert (gpt.heads, gpt.kv_heads, gpt.head_dim, gpt.intermediate) == (12, 12, 64, 3072)


@pytest.mark.parametrize("backend", ["metal", "cuda", "cpu"])
def test_the_reported_prefill_materialises_its_scores_everywhere(backend: str) -> None:
    """16 heads × 2,048 × 64,000 × 2 bytes: the 4.2 GB that killed the reported server."""
    needed = transient(SHAPE, backend).prefill(2048, 62_000)
    assert needed > 4.2e9
    assert needed < 2.5 * 4.2e9
    assert transient(SHAPE, backend).prefill(256, 62_000) < needed / 5


def test_a_fused_kernel_holds_no_scores_but_the_cpu_has_none() -> None:
    assert transient(QWEN3, "metal").prefill(512, 60_000) == transient(QWEN3, "metal").prefill(512, 0)
    assert transient(QWEN3, "cpu").prefill(512, 60_000) > 5 * transient(QWEN3, "cpu").prefill(512, 0)


def test_recurrent_layers_cost_more_without_metals_kernel() -> None:
    assert transient(SHAPE, "cpu").prefill(512, 0) > 1.5 * transient(SHAPE, "metal").prefill(512, 0)


def test_experts_sinks_and_latent_keys_are_counted() -> None:
    plain = transient(QWEN3, "cpu")
    experts = transient(replace(QWEN3, experts_per_id=8, expert_width=768), "cpu")
    per_id = experts.prefill(512, 0) - plain.prefill(512, 0)
    assert per_id == pytest.approx(MARGIN * 512 * 1.3 * 8 * (1024 + 2304) * 2, rel=0.01)
    assert transient(replace(QWEN3, sinks=True), "cpu").prefill(256, 9000) > 2.5 * plain.prefill(256, 9000)
    assert transient(replace(QWEN3, expanded=2048), "cpu").prefill(256, 9000) > plain.prefill(256, 9000)


@pytest.mark.parametrize(("memory", "recommended"), [(16, 10.67), (32, 21.33), (48, 36.0), (128, 96.0)])
def test_a_macs_working_set(memory: int, recommended: float) -> None:
    assert working_set(memory * 10**9) / 1e9 == pytest.approx(recommended, rel=0.01)


MB = 1_000_000
COSTS = Costs(kv_per_token=32_768, layer_per_token=16_384, fixed=2 * MB, states=MB, buffers=20)
PREDICTED = Transient(Scalars(MB, 1000.0, 16.0), Scalars(MB, 5000.0, 40.0))


@given(st.integers(0, 8 << 30))
def test_what_is_planned_fits_and_one_more_does_not(room: int) -> None:
    fit = Fit(COSTS, PREDICTED)
    found = figures(fit, ceiling=room + 7 * MB, weights=7 * MB, context=200_000, most_rows=32)
    longest = found["longest"]
    assert found["fits"] == (longest > 0)
    assert longest == 0 or fit.alone(longest) <= room
    assert longest == 200_000 or fit.alone(longest + 1) > room
    for length, planned in found["sessions"].items():
        count = planned["at_once"]
        assert count <= 32
        if count:
            assert fit.together(count, int(length)) <= room
            assert planned["cache_bytes"] == room - fit.together(1, int(length))
        if 0 < count < 32:
            assert fit.together(count + 1, int(length)) > room


def test_sessions_longer_than_the_context_are_not_spoken_of() -> None:
    fit = Fit(COSTS, PREDICTED)
    found = figures(fit, ceiling=8 << 30, weights=0, context=32_000 + FIRST_ROOM, most_rows=32)
    assert list(found["sessions"]) == ["2000", "8000"]


def test_what_the_model_keeps_beside_its_weights_is_counted_with_them() -> None:
    keeping = Fit(COSTS, replace(PREDICTED, constants=3 * MB))
    kept = figures(keeping, ceiling=60 * MB, weights=7 * MB, context=9_000, most_rows=32)
    assert kept == figures(
        Fit(COSTS, PREDICTED), ceiling=60 * MB, weights=10 * MB, context=9_000, most_rows=32
    )
    assert kept["longest"] < 9_000


def test_weights_beyond_the_ceiling_leave_nothing() -> None:
    found = figures(Fit(COSTS, PREDICTED), ceiling=5 * MB, weights=7 * MB, context=4096, most_rows=32)
    assert (found["fits"], found["longest"]) == (False, 0)
    assert [session["at_once"] for session in found["sessions"].values()] == [0]
