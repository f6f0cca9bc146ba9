"""A real Chromium and real servers. A test's page may log no error, and asks for one thing at a time.

Screenshots go to the directory that $PENSTOCK_SCREENSHOTS names, if it names one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.support.client_model import write_client_model
from tests.support.serve_scripted import ScriptedServer
from tests.support.whole_server import WholeServer

from penstock import models

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
expect.set_options(timeout=30_000)


@pytest.fixture(scope="session", name="chromium")
def _chromium() -> Iterator[Browser]:
    os.environ.pop("LD_PRELOAD", None)  # OpenBLAS, meant for MLX in the tests' own process
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def errors() -> list[str]:
    """What pages have logged as errors. A test that provokes some takes them out."""
    return []


@pytest.fixture(name="open_page")
def _open_page(chromium: Browser, errors: list[str]) -> Iterator[Callable[..., Page]]:
    """Opens a URL in a browser context of its own; `width`, and more of Playwright's options."""
    contexts = []
    most = [0]

    def open_page(url: str, width: int = 1280, height: int = 900, **options: object) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on(
            "console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        asked: set[object] = set()

        def begun(request: object) -> None:
            if "/v1/status" in request.url:  # type: ignore[attr-defined]
                asked.add(request)
                most[0] = max(most[0], len(asked))

        def over(request: object) -> None:
            asked.discard(request)

        page.on("request", begun)
        page.on("requestfinished", over)
        page.on("requestfailed", over)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert most[0] <= 1, "one request at a time"


@pytest.fixture
def picture(request: pytest.FixtureRequest) -> Callable[[Page, str], None]:
    """Keeps a picture of the whole page, where somebody wants pictures."""

    def take(page: Page, name: str) -> None:
        if folder := os.environ.get("PENSTOCK_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{re.sub(r'[^a-z0-9]+', '-', name)}.png", full_page=True)

    return take


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    """The real server with the demo model."""
    scratch = tmp_path_factory.mktemp("demo")
    with WholeServer(models.DEMO, scratch, "--served-model-name", "demo", "--memory-limit", "300M") as server:
        yield server
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """The real front; its engine says what it is told to."""
    scratch = tmp_path_factory.mktemp("scripted")
    with ScriptedServer(write_client_model(scratch / "model"), scratch) as server:
        yield server
    assert "Traceback" not in server.log()
