"""The page with charts in a real browser: everything is drawn, in light and dark, and nothing goes wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from penstock.traffic.client import Record
from penstock.traffic.report import page, rows, summary
from penstock.traffic.watch import Run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"],
            env=environment,  # a preloaded BLAS ends it
            timeout=120_000,
        )
        yield found
        found.close()


def shown(
    browser: Browser, folder: Path, runs: dict[str, list[Run]], scheme: Any = "light"
) -> dict[str, Any]:
    """What is on the page for these runs."""
    found = {name: summary(each) for name, each in runs.items()}
    told = {name: [run.told() for run in each] for name, each in runs.items()}
    file = folder / "page.html"
    file.write_text(page(json.dumps({"about": "<b>about</b>", "table": rows(found), "runs": told})))
    tab = browser.new_page(color_scheme=scheme)
    tab.set_default_timeout(120_000)
    troubles: list[str] = []
    tab.on("console", lambda message: troubles.append(message.text))
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("request", lambda request: troubles.append(request.url) if request.url != file.as_uri() else None)
    tab.goto(file.as_uri())
    seen: dict[str, Any] = tab.evaluate(
        """() => ({
            title: document.title,
            about: document.getElementById("about").textContent,
            cells: [...document.querySelectorAll("tr")].map((row) =>
                [...row.children].map((cell) => cell.textContent)),
            cards: [...document.querySelectorAll("h2")].map((heading) => heading.textContent),
            curves: [...document.querySelectorAll("polyline")].map((line) => line.getAttribute("points")),
            bars: [...document.querySelectorAll("rect")].map((bar) => bar.getAttribute("class")),
            text: document.body.innerText,
            ground: getComputedStyle(document.body).backgroundColor,
        })"""
    )
    tab.close()
    assert troubles == []
    assert "NaN" not in seen["text"] + " ".join(seen["curves"])
    return seen


RUN = Run(
    [
        Record(0, 0, at=0.0, status=200, first=0.5, total=2.0, gaps=[0.1, 0.2], prompt_tokens=9),
        Record(0, 1, at=2.0, status=200, left=True, total=1.0),
        Record(1, 0, at=0.5, error="broken", total=0.2),
    ],
    4.0,
    [(0.0, 900_000_000), (2.0, 1_200_000_000)],
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_servers(browser: Browser, tmp_path: Path, scheme: str) -> None:
    runs = {"one <i>": [RUN, RUN], "two": [RUN]}
    seen = shown(browser, tmp_path, runs, scheme)
    assert seen["title"] == "one <i> beside two"
    assert seen["about"] == "<b>about</b>"
    assert seen["cells"] == rows({name: summary(each) for name, each in runs.items()})
    assert seen["cards"] == [
        "Time to first token", "Between tokens", "Memory", "Requests: one <i>", "Requests: two",
    ]  # fmt: skip
    assert len(seen["curves"]) == 6
    assert all(seen["curves"])
    assert seen["bars"] == ["f0 wait", "f0", "left", "lost", "f1 wait", "f1", "left", "lost"]
    light = seen["ground"] == "rgb(251, 250, 248)"
    assert light is (scheme == "light")


def test_a_run_in_which_nothing_came(browser: Browser, tmp_path: Path) -> None:
    seen = shown(browser, tmp_path, {"x": [Run([Record(0, 0, error="refused")], 0.1, [])]})
    assert seen["cards"] == ["Time to first token", "Between tokens", "Requests: x"]
    assert seen["text"].count("None came.") == 2
