"""The models of the report's tests: written once, measured once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.models import write_model_dir
from tests.support.whole_server import WholeServer

REPORTED_LIMIT = 1_700_000_000
"""RLIMIT_DATA under which mlx_lm.server dies of this traffic (python -m bench.report1390)."""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    """The reported model's structure, served as the reporter did: a model, no memory option."""
    scratch = tmp_path_factory.mktemp("reported")
    model = write_model_dir(scratch / "model", "report")
    with WholeServer(model, scratch, data_limit=REPORTED_LIMIT) as running:
        yield running


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 131 KB of KV per token."""
    return write_model_dir(tmp_path_factory.mktemp("wide") / "model", "wide-kv")
