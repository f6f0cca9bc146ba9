from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.options_page import reference

from penstock import config
from penstock.cli import arguments

REPOSITORY = Path(__file__).parents[2]
ABSENT = object()


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_serve(root.add_subparsers())
    return root


def resolved(*argv: str, environment: dict[str, str] | None = None) -> config.Resolved:
    nowhere = {"XDG_CONFIG_HOME": "/nonexistent"}
    return arguments.resolved(parser().parse_args(["serve", *argv]), {**nowhere, **(environment or {})})


def flags_of_mlx_lm() -> dict[str, dict[str, Any]]:
    """The flags of mlx_lm.server with their literal arguments, read from its source."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("server.py").read_text(encoding="utf-8")
    main = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    flags = {}
    for node in ast.walk(main):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            (name,) = [ast.literal_eval(argument) for argument in node.args]
            flags[name] = {k.arg: literal(k.value) for k in node.keywords}
    return flags


def literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ABSENT


def test_every_flag_of_mlx_lm_server_is_accepted_under_its_name() -> None:
    flags = flags_of_mlx_lm()
    assert len(flags) > 20
    ours = {config.flag_of(option): option for option in config.listed()}
    for name, theirs in flags.items():
        assert name in ours, name
        assert (theirs.get("action") == "store_true") == (ours[name].metadata["form"] is config.SWITCH), name


def test_every_default_that_differs_from_mlx_lm_servers_is_in_the_table() -> None:
    table = (REPOSITORY / "docs" / "moving-from-mlx-lm.md").read_text(encoding="utf-8")
    ours = {config.flag_of(option): option for option in config.listed()}
    differing = set()
    for name, theirs in flags_of_mlx_lm().items():
        default = theirs.get("default", False if theirs.get("action") == "store_true" else None)
        mine = config.default_of(ours[name])
        if default is not ABSENT and default != (json.dumps(mine) if isinstance(mine, dict) else mine):
            differing.add(name)
            assert f"`{name}" in table, f"{name}: {default!r} there, {mine!r} here"
    assert {"--max-tokens", "--temp", "--allowed-origins", "--prompt-cache-size"} <= differing


def test_model_and_positional_model_are_the_same() -> None:
    assert resolved("some/model").options == resolved("--model", "some/model").options
    with pytest.raises(config.ConfigError, match="Two models"):
        resolved("a/b", "--model", "c/d")


def test_lists_may_be_repeated_or_separated_by_commas() -> None:
    assert resolved("--served-model-name", "a", "--served-model-name", "b,c").options.served_model_name == (
        "a",
        "b",
        "c",
    )


def test_a_switch_set_elsewhere_can_be_taken_back() -> None:
    environment = {"PENSTOCK_STRICT_MODEL_NAMES": "1"}
    assert resolved(environment=environment).options.strict_model_names
    assert not resolved("--no-strict-model-names", environment=environment).options.strict_model_names


def test_the_config_file_is_the_flags_then_the_variables_then_the_usual_one(tmp_path: Path) -> None:
    usual = tmp_path / "penstock" / "config.toml"
    usual.parent.mkdir()
    usual.write_text("port = 1")
    (named := tmp_path / "named.toml").write_text("port = 2")
    (flagged := tmp_path / "flagged.toml").write_text("port = 3")
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert resolved(environment=environment).options.port == 1
    environment["PENSTOCK_CONFIG"] = str(named)
    assert resolved(environment=environment).options.port == 2
    assert resolved("--config", str(flagged), environment=environment).options.port == 3


def test_an_unreadable_config_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"none\.toml cannot be read: No such file"):
        resolved("--config", str(tmp_path / "none.toml"))
    (broken := tmp_path / "broken.toml").write_text("port = ")
    with pytest.raises(config.ConfigError, match="cannot be read"):
        resolved("--config", str(broken))


@given(
    texts=st.dictionaries(
        st.sampled_from(["model", "host", "chat_template"]),
        st.text(st.characters(exclude_categories=("Cs",))),
    ),
    port=st.integers(0, 65535),
    temp=st.none() | st.floats(0, 10),
    size=st.integers(0, 2**50),
    names=st.lists(st.from_regex(r"[a-z/\"'\\-]{1,9}", fullmatch=True)),
    kwargs=st.dictionaries(st.text(max_size=5), st.booleans() | st.text(max_size=5), max_size=3),
)
def test_what_is_printed_sets_the_same_options_again(
    texts: dict[str, str],
    port: int,
    temp: float | None,
    size: int,
    names: list[str],
    kwargs: dict[str, Any],
) -> None:
    flags: dict[str, str | None] = {
        **texts,
        "port": str(port),
        "temp": None if temp is None else repr(temp),
        "front_memory": str(size),
        "served_model_name": ",".join(names),
        "chat_template_args": json.dumps(kwargs),
    }
    first = config.resolve(flags, {}, {})
    again = config.resolve({}, {}, tomllib.loads(arguments.as_toml(first)))
    assert again.options == first.options


def test_a_printed_configuration_shows_where_values_come_from_but_no_key() -> None:
    printed = arguments.as_toml(resolved("--api-key", "hush", environment={"PENSTOCK_PORT": "9"}))
    assert "hush" not in printed
    assert "# api_key is set by --api-key" in printed
    assert "port = 9  # PENSTOCK_PORT" in printed
    assert "front_memory = 1000000000  # default = 1.0 GB" in printed


def test_the_options_page_is_the_generated_one() -> None:
    page = (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == reference(), "run `make docs`"
