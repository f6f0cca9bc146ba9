"""The demo server that the suites of others are run against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.whole_server import WholeServer

from penstock.models import DEMO


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    """At the end no engine has died, and no fault is in the log."""
    with WholeServer(DEMO, tmp_path_factory.mktemp("demo")) as running:
        yield running
        assert running.health()["engine_deaths"] == 0
    assert "Traceback" not in running.log()
