"""Models and servers of the report's tests: written once, measured once, shared where nobody is disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.models import write_model_dir
from tests.support.whole_server import WholeServer

REPORTED_LIMIT = 1_700_000_000
"""RLIMIT_DATA under which mlx_lm.server dies of this traffic (python -m bench.report1390)."""
SMALL_LIMIT = 1_000_000_000
"""The same for tests that fill the cache: what is to be full is full sooner."""


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the second server with a model does not measure its steps again."""
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("measured"))}


@pytest.fixture(scope="session")
def report_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reported model's structure: a hybrid with head_dim 256 and 32 KB of KV per token."""
    return write_model_dir(tmp_path_factory.mktemp("report") / "model", "report")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 131 KB of KV per token."""
    return write_model_dir(tmp_path_factory.mktemp("wide") / "model", "wide-kv")


@pytest.fixture(scope="module")
def reported(
    report_model: Path, measured: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WholeServer]:
    """The reported model, served as the reporter did: a model, no memory option."""
    scratch = tmp_path_factory.mktemp("reported")
    with WholeServer(report_model, scratch, data_limit=REPORTED_LIMIT, environment=measured) as running:
        yield running


@pytest.fixture(scope="module")
def small(
    report_model: Path, measured: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WholeServer]:
    """The same where there is less memory, still with no memory option."""
    scratch = tmp_path_factory.mktemp("small")
    with WholeServer(report_model, scratch, data_limit=SMALL_LIMIT, environment=measured) as running:
        yield running


@pytest.fixture(scope="module")
def plain(
    wide: Path, measured: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WholeServer]:
    """The wide model and no limit at all: for tests that leave the server as it was."""
    with WholeServer(wide, tmp_path_factory.mktemp("plain"), environment=measured) as running:
        yield running
