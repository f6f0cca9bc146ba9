from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import config
from penstock.config import ConfigError, Options, resolve


def option(name: str) -> dataclasses.Field[object]:
    return next(field for field in config.listed() if field.name == name)


@given(st.sets(st.sampled_from(["flag", "variable", "file"])))
def test_flag_goes_before_variable_before_file_before_default(places: set[str]) -> None:
    resolved = resolve(
        {"port": "1" if "flag" in places else None},
        {"PENSTOCK_PORT": "2"} if "variable" in places else {},
        {"port": 3} if "file" in places else {},
    )
    expected = 1 if "flag" in places else 2 if "variable" in places else 3 if "file" in places else 8080
    assert resolved.options.port == expected
    assert bool(resolved.sources) == bool(places)


def test_all_three_places_share_one_parser() -> None:
    by_flag = resolve({"front_memory": "2GiB", "demo": "true", "allowed_hosts": "a, b"}, {}, {})
    by_variable = resolve(
        {},
        {"PENSTOCK_FRONT_MEMORY": "2GiB", "PENSTOCK_DEMO": "yes", "PENSTOCK_ALLOWED_HOSTS": "a,b"},
        {},
    )
    by_file = resolve({}, {}, {"front-memory": "2GiB", "demo": True, "allowed_hosts": ["a", "b"]})
    assert by_flag.options == by_variable.options == by_file.options
    assert by_flag.options.front_memory == 2 * 1024**3
    assert by_flag.options.allowed_hosts == ("a", "b")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "8080.5"),
        ("temp", "nan"),
        ("temp", "-0.1"),
        ("temp", "inf"),
        ("top_p", "1.01"),
        ("max_tokens", "0"),
        ("demo", "perhaps"),
        ("log_level", "LOUD"),
        ("chat_template_args", "[]"),
        ("chat_template_args", "{"),
        ("front_memory", "big"),
    ],
)
def test_a_value_of_the_wrong_form_is_named_in_one_sentence(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({name: text}, {}, {})
    assert str(caught.value).startswith(config.flag_of(option(name)))
    assert str(caught.value).endswith(".")


def test_the_place_of_a_wrong_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^PENSTOCK_PORT must be .*, not 'x'\.$"):
        resolve({}, {"PENSTOCK_PORT": "x"}, {})
    with pytest.raises(ConfigError, match=r"^'port' in here\.toml must be "):
        resolve({}, {}, {"port": "x"}, "here.toml")


def test_an_unknown_key_is_refused_with_the_nearest_option() -> None:
    with pytest.raises(ConfigError, match=r"'max_token' is not an option; did you mean 'max_tokens'\?"):
        resolve({}, {}, {"max_token": 5})


def test_unknown_variables_are_found() -> None:
    environment = {"PENSTOCK_PROT": "1", "PENSTOCK_PORT": "1", "PENSTOCK_CONFIG": "x", "HOME": "y"}
    assert config.unknown_variables(environment) == ["PENSTOCK_PROT"]


def test_of_demo_and_model_the_one_set_nearer_stands() -> None:
    assert resolve({"demo": "true"}, {}, {"model": "m"}).options.model is None
    assert not resolve({"model": "m"}, {"PENSTOCK_DEMO": "1"}, {}).options.demo
    assert resolve({}, {"PENSTOCK_DEMO": "1"}, {"model": "m"}).options.model is None
    both = resolve({"demo": "true", "model": "m"}, {}, {}).options
    assert both.demo
    assert both.model == "m"


def test_every_option_is_documented() -> None:
    for field in config.listed():
        assert re.fullmatch(r"[A-Zmt].*\.", field.metadata["help"]), field.name
    assert {"temp", "max_tokens", "api_key"} <= {f.name for f in config.listed() if "unset" in f.metadata}


def test_what_this_version_does_not_do_is_refused_by_name() -> None:
    assert config.refusal(Options()) is None
    for name, value in [("draft_model", "m"), ("adapter_path", "a"), ("pipeline", True), ("kv_bits", 4)]:
        sentence = config.refusal(dataclasses.replace(Options(), **{name: value}))
        assert sentence is not None
        assert sentence.startswith(config.flag_of(option(name)))
    assert config.refusal(Options(num_draft_tokens=5, kv_group_size=32, quantized_kv_start=0)) is None


def test_a_secret_never_appears_in_an_error() -> None:
    hush = dataclasses.field(metadata={"form": config.Form("", "unlike this", int), "secret": True})
    with pytest.raises(ConfigError, match=r"^--hush must be unlike this\.$"):
        config._parsed(hush, "the secret", "--hush")


def test_an_empty_variable_is_no_setting() -> None:
    assert resolve({}, {"PENSTOCK_PORT": "", "PENSTOCK_MODEL": ""}, {}).options == Options()
