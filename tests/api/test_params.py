"""Defaults and mappings of request fields: pure."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from tests.support.fake_backend import READY

from penstock import wire
from penstock.api import params
from penstock.api.schema import CompletionRequest
from penstock.errors import PenstockError


def request(**fields: object) -> CompletionRequest:
    return CompletionRequest(prompt="x", **fields)  # type: ignore[arg-type]


def test_without_any_word_the_values_are_mlx_lms() -> None:
    values = params.chosen_defaults({}, {})
    assert params.sampling(request(), values, 100, 50) == wire.Sampling(xtc_threshold=0.1)


@pytest.mark.parametrize(
    ("field", "flag", "config", "chosen"),
    [
        (0.1, 0.2, 0.3, 0.1),
        (0.0, 0.2, 0.3, 0.0),
        (None, 0.2, 0.3, 0.2),
        (None, 0.0, 0.3, 0.0),
        (None, None, 0.3, 0.3),
        (None, None, None, 0.0),
        (None, None, "hot", 0.0),
        (None, None, -1, 0.0),
        (None, None, True, 0.0),
    ],
)
def test_request_over_flag_over_model(
    field: float | None, flag: float | None, config: object, chosen: float
) -> None:
    values = params.chosen_defaults({"temperature": flag}, {"temperature": config})
    assert params.sampling(request(temperature=field), values, 100, 50).temperature == chosen


def test_do_sample_says_what_a_missing_temperature_means() -> None:
    assert params.chosen_defaults({}, {"do_sample": False, "temperature": 0.6})["temperature"] == 0.0
    assert params.chosen_defaults({}, {"do_sample": True})["temperature"] == 1.0
    assert params.chosen_defaults({"temperature": 0.3}, {"do_sample": False})["temperature"] == 0.3


def test_odd_values_are_brought_into_what_the_engine_takes() -> None:
    values = params.chosen_defaults({}, {})
    odd = request(temperature=1e-7, top_k=10**9, repetition_penalty=0, repetition_context_size=10**9)
    sampling = params.sampling(odd, values, 100, 50)
    assert (sampling.temperature, sampling.top_k) == (0.0, 100)
    assert (sampling.repetition_penalty, sampling.repetition_context_size) == (1.0, 50)
    assert params.sampling(request(top_k=-1), values, 100, 50).top_k == 0


def test_logit_bias_keys_are_ids_of_the_vocabulary() -> None:
    values = params.chosen_defaults({}, {})
    assert params.sampling(request(logit_bias={"99": 1.5}), values, 100, 50).logit_bias == {99: 1.5}
    for key in ("100", "-1", "x", "1.0", "", " 1", "٣", "9" * 5000):
        with pytest.raises(PenstockError) as caught:
            params.sampling(request(logit_bias={key: 1.0}), values, 100, 50)
        assert caught.value.param == "logit_bias"


def test_most_tokens() -> None:
    assert params.most_tokens(request(), None, 50) is None
    assert params.most_tokens(request(), 7, 50) == 7
    assert params.most_tokens(request(max_tokens=5), 7, 50) == 5
    assert params.most_tokens(request(max_tokens=5, max_completion_tokens=6), 7, 50) == 6
    assert params.most_tokens(request(max_tokens=10**30), 7, 50) == 50


def test_a_prompt_needs_room_for_one_token() -> None:
    ready = msgspec.structs.replace(READY, context_length=50)
    params.check_length(49, ready, "messages")
    with pytest.raises(
        PenstockError, match="maximum context length is 50 tokens, but the prompt has 50 tokens"
    ):
        params.check_length(50, ready, "messages")
    tight = msgspec.structs.replace(ready, longest=30, ceiling=2_000_000_000, decided_by="the rlimit")
    with pytest.raises(PenstockError, match=r"length is 30 tokens.*takes 50.*2.0 GB, the rlimit"):
        params.check_length(30, tight, "messages")


def test_ids() -> None:
    assert params.check_ids([0, 99], 100, "prompt") == array("I", [0, 99])
    for ids, path in (([1, 100], "prompt[1]"), ([-1], "prompt[0]"), ([1, 2, 2**64], "prompt[2]")):
        with pytest.raises(PenstockError) as caught:
            params.check_ids(ids, 100, "prompt")
        assert caught.value.param == path
