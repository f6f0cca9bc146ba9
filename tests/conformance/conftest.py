"""The demo server that the suites of others are run against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.whole_server import WholeServer

from penstock.models import DEMO


@pytest.fixture(scope="module")
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    """With the file's FLAGS, if it has some. At the end no engine has died, and no fault is in the log."""
    flags = getattr(request.module, "FLAGS", ())
    with WholeServer(DEMO, tmp_path_factory.mktemp("demo"), *flags) as running:
        yield running
        assert running.health()["engine_deaths"] == 0
    assert "Traceback" not in running.log()
