from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock import models
from penstock.models import ModelProblem


def make_model(
    path: Path, config: dict[str, Any] | None = None, weights: tuple[str, ...] = ("model",)
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "qwen3_5"}))
    (path / "tokenizer.json").write_text("{}")
    for name in weights:
        (path / f"{name}.safetensors").write_bytes(b"\0" * 10)
    return path


def make_cached(cache: Path, name: str, **made: Any) -> Path:
    folder = cache / ("models--" + name.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    return make_model(folder / "snapshots" / "abc123", **made)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def problem(path: Path) -> str:
    with pytest.raises(ModelProblem) as caught:
        models.check(path)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def test_a_whole_model_passes(tmp_path: Path) -> None:
    models.check(make_model(tmp_path / "m"))


def test_each_fault_of_a_directory_is_named(tmp_path: Path) -> None:
    assert "does not exist" in problem(tmp_path / "none")
    (file := tmp_path / "file").write_text("")
    assert "not a directory" in problem(file)
    (empty := tmp_path / "empty").mkdir()
    assert "no config.json" in problem(empty)
    (empty / "config.json").write_text("{")
    assert "cannot be read" in problem(empty)
    (empty / "config.json").write_text("{}")
    assert "names no model_type" in problem(empty)
    assert "no weights" in problem(make_model(tmp_path / "bare", weights=()))
    gguf = make_model(tmp_path / "gguf", weights=())
    (gguf / "q4.gguf").write_bytes(b"")
    assert "q4.gguf" in problem(gguf)
    untokenised = make_model(tmp_path / "untokenised")
    (untokenised / "tokenizer.json").unlink()
    assert "tokenizer.json" in problem(untokenised)


def test_a_download_cut_off_is_named_with_a_missing_file(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", weights=("model-1",))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 1 of 2 weight files, model-2.safetensors among them" in problem(path)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "mistral"}, True),
        ({"model_type": "kimi_k2"}, True),
        ({"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]}, True),
        ({"model_type": "no_such_thing"}, False),
        ({"model_type": "cache"}, False),
        ({"model_type": "../models/llama"}, False),
    ],
)
def test_architectures_are_those_of_the_installed_mlx_lm(
    tmp_path: Path, config: dict[str, Any], known: bool
) -> None:
    path = make_model(tmp_path / "m", config)
    if known:
        models.check(path)
    else:
        assert "no model of type" in problem(path)


def test_code_in_a_repository_is_trusted_only_when_told(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", {"model_type": "own", "model_file": "own.py"})
    assert "--trust-remote-code" in problem(path)
    models.check(path, trust_remote_code=True)


def test_a_cached_model_is_served_without_a_request(cache: Path) -> None:
    path = make_cached(cache, "org/name")
    assert models.precheck("org/name") == path
    assert models.resolve("org/name") == path


def test_offline_a_model_that_is_not_there_is_refused_at_once(cache: Path) -> None:
    with pytest.raises(ModelProblem, match="HF_HUB_OFFLINE") as caught:
        models.precheck("org/name")
    assert caught.value.exit_code == 2


def test_online_what_is_missing_or_half_there_is_left_to_the_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert models.precheck("org/name") is None
    make_cached(cache, "org/half", weights=())
    assert models.precheck("org/half") is None
    make_cached(cache, "org/strange", config={"model_type": "no_such_thing"})
    with pytest.raises(ModelProblem, match="no_such_thing"):
        models.precheck("org/strange")


def test_what_is_neither_path_nor_name_is_refused(cache: Path) -> None:
    for model in ("a b", "a/b/c", "http://x/y", "-x/y"):
        with pytest.raises(ModelProblem, match="neither a directory nor"):
            models.precheck(model)


def test_the_cache_lists_what_could_be_served(cache: Path) -> None:
    assert models.found_in_cache() == {}
    make_cached(cache, "org/good", weights=("model-1", "model-2"))
    make_cached(cache, "org/strange", config={"model_type": "no_such_thing"})
    make_cached(cache, "alone")
    assert list(models.found_in_cache().items()) == [("alone", 10), ("org/good", 20)]


@pytest.mark.parametrize(
    ("named", "place"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, "/c"),
    ],
)
def test_the_cache_is_where_huggingface_hub_keeps_it(
    named: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    assert models.hub_cache() == Path(place).expanduser()
