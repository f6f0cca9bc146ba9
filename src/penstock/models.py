"""From what the user called the model to a directory that can be served, or one sentence saying why not.

Owns: what counts as a servable directory, the hub cache's layout, downloads. Refuses: importing MLX, and
any request at the network for a model whose files are all here. A problem is found as early as it can be:
`precheck` looks at what is on the disk, `resolve` may download.
"""

from __future__ import annotations

import ast
import errno
import functools
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from penstock.demo import model_path
from penstock.errors import StartProblem

DEMO = model_path()
WEIGHTS = "model*.safetensors"
PATTERNS = ("*.json", WEIGHTS, "*.txt", "*.jsonl", "*.jinja", "tokenizer.model", "*.tiktoken")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class ModelProblem(StartProblem):
    """The model cannot be served."""


class Incomplete(ModelProblem):
    """Files of the model are missing or broken off: a download may mend it."""


def check(path: Path, *, trust_remote_code: bool = False) -> None:
    """Raise ModelProblem unless `path` holds a configuration we know, all its weights and a tokenizer."""
    if not path.exists():
        raise ModelProblem(f"{path} does not exist.")
    if not path.is_dir():
        raise ModelProblem(f"{path} is not a directory.")
    config = _json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelProblem(f"{path}: config.json names no model_type.")
    if "model_file" in config:
        if not trust_remote_code:
            raise ModelProblem(
                f"{path} brings Python code of its own: read it, then add --trust-remote-code."
            )
    elif not _implemented(config):
        raise ModelProblem(f"{path}: this mlx-lm has no model of type {config['model_type']!r}.")
    _check_weights(path)
    if not (path / "tokenizer.json").is_file():
        raise Incomplete(f"{path} has no tokenizer.json.")


def precheck(model: str, *, trust_remote_code: bool = False) -> Path | None:
    """The model's directory if it is on this machine, else None: then it is for `resolve` to download.

    Raises ModelProblem for everything that is known to fail without asking the network.
    """
    if _is_path(model):
        path = Path(model).expanduser()
        check(path, trust_remote_code=trust_remote_code)
        return path
    if not _REPOSITORY.fullmatch(model):
        raise ModelProblem(f"{model!r} is neither a directory nor the name of a hub repository.")
    cached = snapshot(model)
    if cached is None and _offline():
        raise ModelProblem(f"{model} is not in the hub cache, and HF_HUB_OFFLINE forbids a download.")
    try:
        if cached is not None:
            check(cached, trust_remote_code=trust_remote_code)
    except Incomplete:
        if _offline():
            raise
        return None
    return cached


def resolve(model: str, *, trust_remote_code: bool = False) -> Path:
    """The model's directory, downloaded if need be, with a progress bar on a terminal.

    Raises ModelProblem.
    """
    here = precheck(model, trust_remote_code=trust_remote_code)
    if here is not None:
        return here
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    patterns = [*PATTERNS, "*.py"] if trust_remote_code else [*PATTERNS]
    with _hub_problems(model):
        path = Path(snapshot_download(model, allow_patterns=patterns))
    check(path, trust_remote_code=trust_remote_code)
    return path


def found_in_cache() -> dict[str, int]:
    """The hub cache's models that `check` accepts, by name, with the bytes of their weights."""
    found = {}
    for folder in sorted(hub_cache().glob("models--*")):
        name = folder.name.removeprefix("models--").replace("--", "/")
        with suppress(ModelProblem):
            if path := snapshot(name):
                check(path)
                found[name] = sum(file.stat().st_size for file in path.glob(WEIGHTS))
    return found


def hub_cache() -> Path:
    """Where huggingface_hub keeps repositories, by its rules, without importing it."""
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or caches / "huggingface").expanduser() / "hub"


def snapshot(name: str) -> Path | None:
    """The directory of a repository's main revision in the hub cache, or None."""
    folder = hub_cache() / ("models--" + name.replace("/", "--"))
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    path = folder / "snapshots" / revision
    return path if path.is_dir() else None


def _is_path(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~")) or model in (".", "..") or Path(model).exists()


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Incomplete(f"{path.parent} is no model: it has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise Incomplete(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise Incomplete(f"{path} is not a JSON object.")
    return value


def _check_weights(path: Path) -> None:
    if not any(path.glob(WEIGHTS)):
        other = next(
            (file.name for kind in ("*.gguf", "*.bin", "*.safetensors") for file in path.glob(kind)), None
        )
        hint = f" ({other} is of a kind that MLX does not load)" if other else ""
        raise Incomplete(f"{path} has no weights: no file is named {WEIGHTS}{hint}.")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        needed = set(_json(index).get("weight_map", {}).values())
        missing = sorted(name for name in needed if not (path / name).is_file())
        if missing:
            raise Incomplete(
                f"{path} lacks {len(missing)} of {len(needed)} weight files, {missing[0]} among them."
            )


def _implemented(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm has a model class for this configuration, by its own tables, read but not run."""
    spec = importlib.util.find_spec("mlx_lm")  # finds a top-level package without running it
    if spec is None or spec.origin is None:
        raise ModelProblem("mlx-lm is not installed: run `make venv`, or install penstock again.")
    root = Path(spec.origin).parent
    tables = _remappings(root)
    types, architectures = tables["MODEL_REMAPPING"], tables["MODEL_ARCHITECTURE_REMAPPING"]
    model_type = config["model_type"]
    named = config.get("architectures") or ()
    for architecture in (named,) if isinstance(named, str) else named:
        if (model_type, architecture) in architectures:
            model_type = architectures[model_type, architecture]
            break
    else:
        model_type = types.get(model_type, model_type)
    source = root / "models" / f"{model_type}.py"
    return (
        "/" not in model_type and source.is_file() and "\nclass Model(" in source.read_text(encoding="utf-8")
    )


@functools.cache
def _remappings(root: Path) -> dict[str, Any]:
    """The tables of that name in mlx_lm.utils."""
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((root / "utils.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.endswith("_REMAPPING")
    }


def describe_remote(name: str, folder: Path) -> dict[str, Any]:
    """What the hub tells of a model without its weights: configs into `folder`, and all tensors' headers.

    The headers are as `weights.header` gives them. Raises ModelProblem.
    """
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    with _hub_problems(name):
        snapshot_download(name, allow_patterns=["config.json", "generation_config.json"], local_dir=folder)
        files = get_safetensors_metadata(name).files_metadata
    return {
        tensor: {"dtype": facts.dtype, "shape": facts.shape, "data_offsets": facts.data_offsets}
        for file in files.values()
        for tensor, facts in file.tensors.items()
    }


@contextmanager
def _hub_problems(name: str) -> Iterator[None]:
    """Whatever the hub, the network or the disk object becomes a ModelProblem."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise ModelProblem(f"{name} is gated: accept its terms on the hub, then set HF_TOKEN.") from None
    except RepositoryNotFoundError:
        raise ModelProblem(
            f"The hub has no model named {name} (or it is private: then set HF_TOKEN), "
            "and there is no such directory here."
        ) from None
    except NotASafetensorsRepoError:
        raise ModelProblem(f"{name} has no weights in a form that MLX loads (safetensors).") from None
    except Exception as error:  # several HTTP libraries lie below, each with errors of its own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ModelProblem(f"The disk of {hub_cache()} is full: {name} does not fit.") from None
        response = error.response if isinstance(error, HfHubHTTPError) else None
        cause = "no connection" if response is None else f"HTTP {response.status_code}"
        raise ModelProblem(
            f"There is no directory {name} here, and the hub cannot give it now: {cause}.", exit_code=1
        ) from error
