"""Loading a model directory: light imports, facts as measured, and refusals in one sentence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tests.support import tiny_models

from penstock.engine import calibrate, loader
from penstock.engine.batch import Runner


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model_dir(tmp_path_factory.mktemp("model"), "qwen3_5")


def edit(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_written_model_comes_back_the_same(directory: Path) -> None:
    loaded = loader.load(directory)
    expected = tiny_models.greedy(tiny_models.build("qwen3_5"), [1, 2, 3], 12)
    assert tiny_models.greedy(loaded.model, [1, 2, 3], 12) == expected


def test_loading_needs_no_transformers(directory: Path) -> None:
    """In a process of its own. The seam is there too; without it this import would not be ours to lighten."""
    code = (
        "import sys; from pathlib import Path; from penstock.engine import loader, seams\n"
        "loaded = loader.load(Path(sys.argv[1]))\n"
        "assert seams.missing() is None\n"
        "heavy = [m for m in ('transformers', 'torch', 'mlx_lm.tokenizer_utils') if m in sys.modules]\n"
        "print(heavy, loaded.facts.model_type)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "[] qwen3_5"


def test_where_the_stand_in_does_not_fit_the_plain_import_serves(directory: Path) -> None:
    code = (
        "import sys, importlib.abc; from penstock.engine import lean\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        stand_in = getattr(sys.modules.get('mlx_lm.tokenizer_utils'), 'load', 0) is None\n"
        "        if name == 'mlx_lm.utils' and stand_in: raise ImportError('it wants more')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "print(lean.utils().load_model.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "mlx_lm.utils"


def test_facts_are_measured_on_the_models_own_caches(directory: Path) -> None:
    loaded = loader.load(directory)
    facts, costs = loaded.facts, calibrate.costs_of(Runner(loaded.model))
    assert facts.model_type == "qwen3_5"
    assert facts.context_length == 4096
    assert facts.eos_ids == {tiny_models.END_OF_TURN}
    assert facts.vocab_size == tiny_models.VOCAB
    assert costs.kv_per_token == 1 * 2 * 2 * 16 * 4  # layers, K and V, heads, width, float32
    assert costs.states == 3 * (3 * 128 + 4 * 16 * 16) * 4  # layers, convolution and recurrent state
    assert facts.weights_bytes >= sum(path.stat().st_size for path in directory.glob("*.safetensors")) * 0.9


def test_a_window_counts_apart() -> None:
    model = tiny_models.build("gemma3_text")
    costs, layers = calibrate.costs_of(Runner(model)), 2
    assert (costs.kv_per_token, loader.measure(model).windows) == (layers * 2 * 2 * 16 * 4, (24,))
    growing = costs.kv_per_token // layers  # a window grows by concatenation, so one of them exists twice
    assert costs.fixed == (layers + 1) * 24 * growing


@pytest.mark.parametrize(
    ("main", "generation", "expected"),
    [
        (
            {"eos_token_id": 7, "text_config": {"eos_token_id": [8, 9]}},
            {"eos_token_id": [7, 10]},
            {7, 8, 9, 10},
        ),
        ({"eos_token_id": None}, {}, set()),
        ({"eos_token_id": [7, True]}, {"eos_token_id": False}, {7}),
        ({}, {"eos_token_id": 3}, {3}),
    ],
)
def test_every_file_may_name_ends(
    tmp_path: Path, main: dict[str, Any], generation: dict[str, Any], expected: set[int]
) -> None:
    edit(tmp_path, "config.json", **main)
    edit(tmp_path, "generation_config.json", **generation)
    assert loader._eos_ids(loader.read_configs(tmp_path)) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 77}}, 77),
        ({"max_position_embeddings": 5.0}, 5),
        ({"n_ctx": 9}, 9),
        ({"max_position_embeddings": "many"}, loader.NO_LIMIT),
        ({"text_config": None}, loader.NO_LIMIT),
    ],
)
def test_the_context_length_may_stand_in_several_places(
    tmp_path: Path, config: dict[str, Any], expected: int
) -> None:
    edit(tmp_path, "config.json", **config)
    assert loader._context_length(loader.read_configs(tmp_path)) == expected


def refusal(directory: Path) -> str:
    with pytest.raises(loader.LoadError) as caught:
        loader.load(directory)
    return str(caught.value)


def test_a_directory_that_holds_no_model(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is not a model directory: it has no config.json."


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert refusal(copy) == f"{copy} holds no weights (model*.safetensors)."


def test_an_unknown_architecture(copy: Path) -> None:
    edit(copy, "config.json", model_type="tomorrow")
    assert refusal(copy).endswith(f" does not know the architecture 'tomorrow' of {copy}.")


def test_own_code_needs_trust(copy: Path) -> None:
    edit(copy, "config.json", model_file="model.py")
    assert refusal(copy) == f"{copy} brings its own model code, which only --trust-remote-code would run."


def test_an_architecture_that_ends_the_process(copy: Path) -> None:
    edit(copy, "config.json", model_type="olmo")
    assert refusal(copy) == f"the code of {copy.name}'s architecture needs a package that is not installed."


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_weights_that_do_not_fit(copy: Path, change: str) -> None:
    weights = mx.load(str(copy / "model.safetensors"))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "shape":
        weights[name] = mx.zeros((3, 3))
    else:
        weights["language_model.model.layers.9.mlp.up_proj.weight"] = mx.zeros((3, 3))
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    assert refusal(copy).startswith(f"the weights in {copy} don't fit its config.json: ")


def test_weights_cut_off(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(copy).startswith(f"the weights in {copy} can't be read: ")


def test_a_config_that_lacks_something(copy: Path) -> None:
    edit(copy, "config.json", model_type="qwen3", text_config=None)
    assert refusal(copy).startswith(
        (f"mlx-lm can't build the model in {copy}: ", f"the config.json in {copy} ")
    )


def test_bfloat16_is_computed_in_float32_on_a_cpu(tmp_path: Path) -> None:
    tiny_models.write_model_dir(tmp_path, "qwen3")
    weights = mx.load(str(tmp_path / "model.safetensors"))
    half = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), half, metadata={"format": "mlx"})
    loaded = loader.load(tmp_path)
    assert loaded.model.model.embed_tokens.weight.dtype == mx.float32
    assert calibrate.costs_of(Runner(loaded.model)).kv_per_token == 1024


def test_quantised_weights_stay(tmp_path: Path) -> None:
    from mlx import nn
    from mlx.utils import tree_flatten

    config = tiny_models.config_of("qwen3", hidden_size=64) | {"quantization": {"group_size": 32, "bits": 8}}
    model = tiny_models.make(config)
    nn.quantize(model, group_size=32, bits=8)
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = loader.load(tmp_path)
    projection = loaded.model.model.layers[0].self_attn.q_proj
    assert (projection.weight.dtype, projection.scales.dtype) == (mx.uint32, mx.float32)
    assert loaded.model(mx.array([[1, 2]])).dtype == mx.float32


def test_each_array_that_is_there_is_a_sign_of_life(directory: Path) -> None:
    beats: list[int] = []
    loaded = loader.load(directory, beat=lambda: beats.append(1))
    assert len(beats) == len(tree_flatten(loaded.model.parameters()))
