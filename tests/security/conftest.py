"""One server for the attacks: the demo model, all of it real, no key. None may end it, or its engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.whole_server import WholeServer

from penstock.models import DEMO


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    """At the end of a file: the engine that was there at the start answers, and no fault is in the log."""
    with WholeServer(DEMO, tmp_path_factory.mktemp("target"), "--log-level", "DEBUG") as running:
        yield running
        answer = running.ask("hello", 2)
        assert answer.answered, answer
        assert running.health()["engine_deaths"] == 0
        assert running.stop() == 0
    assert "Traceback" not in running.log()
