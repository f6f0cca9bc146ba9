"""The server under the clients: the whole program, with a scripted engine. One for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.support.client_model import write_client_model
from tests.support.serve_scripted import ScriptedServer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_client_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """At the end of the file: no traceback in the log, no row left, and a clean exit."""
    with ScriptedServer(model_dir, tmp_path_factory.mktemp("server"), keepalive=0.2) as running:
        yield running
        submitted = {event["id"] for event in running.events("submit")}
        over = ("end", "finished", "died")
        running.until(lambda: submitted <= {e["id"] for e in running.events() if e["event"] in over})
        assert running.stop() == 0, running.log()[-3000:]
    assert "Traceback" not in running.log()


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[openai.OpenAI]:
    server.rules()
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made
