"""The page in a real browser, against real servers: what it shows is so, and what it offers works."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect
from tests.support.client_model import write_client_model
from tests.support.hang_ups import post, until
from tests.support.serve_scripted import ScriptedServer
from tests.support.whole_server import WholeServer

pytestmark = pytest.mark.browser
SECRET = "heron in the reeds"
ENDLESS = {
    "messages": [{"role": "user", "content": SECRET}],
    "stream": True,
    "ignore_eos": True,
    "max_tokens": 6000,
}
Open = Callable[..., Page]
Picture = Callable[[Page, str], None]


def state(page: Page, name: str) -> None:
    expect(page.locator("#state")).to_have_text(re.compile(name))


def test_the_load_line_moves_with_a_request(demo: WholeServer, open_page: Open, picture: Picture) -> None:
    page = open_page(demo.url)
    state(page, "Ready")
    expect(page.locator("h1")).to_have_text("demo")
    expect(page.locator("#plot path.area.weights")).to_have_attribute("d", re.compile(r"^M\d"))
    before = page.locator("#plot path.area.live_kv").get_attribute("d")
    with contextlib.closing(post(demo.port, ENDLESS)) as stream:
        until(stream, b'"content":"', 5)
        requests = page.locator("#legend li", has_text="requests").locator("b")
        expect(requests).to_have_text(re.compile(r"^[\d.]*[1-9][\d.]* [MG]B"))
        expect(page.locator("#lines")).to_have_text("1 running, 0 waiting")
        expect(page.locator("#requests li .stage")).to_have_text("Writing")
        expect(page.locator("#requests li .left")).to_have_text(re.compile(r"^[\d.]+ tok/s$"))
        expect(page.locator("#pace")).to_have_text(re.compile(r"[1-9]\d* tok/s written"))
        assert page.locator("#plot path.area.live_kv").get_attribute("d") != before
        expect(page.locator("#limits")).to_have_text(re.compile("Load line: 300 MB, set by --memory-limit"))
        expect(page.locator("#plot text.load")).to_have_text("load line at 300 MB, above this picture ↑")
        page.get_by_role("button", name="Show the whole budget").click()
        expect(page.locator("#plot text.load")).to_have_text("load line 300 MB")
        assert SECRET not in page.content()
        picture(page, "a request")
    expect(page.locator("#quiet")).to_be_visible()


def test_cancel_ends_a_running_request(demo: WholeServer, open_page: Open) -> None:
    page = open_page(demo.url)
    with contextlib.closing(post(demo.port, ENDLESS)) as stream:
        until(stream, b'"content":"', 3)
        page.locator("#requests li").first.wait_for()
        page.get_by_role("button", name="Cancel request").click()
        rest = until(stream, b"\r\n0\r\n\r\n")
        expect(page.locator("#requests li")).to_have_count(0)
    assert b'"code":"request_cancelled"' in rest
    expect(page.locator("#done")).to_have_text(re.compile(r"\d+ stopped"))


def test_a_cancel_shows_before_the_server_has_answered(scripted: ScriptedServer, open_page: Open) -> None:
    scripted.rules({"when": "", "pieces": ["word "] * 1000, "step": 0.05})
    page = open_page(scripted.url)
    with contextlib.closing(post(scripted.port, ENDLESS)) as stream:
        until(stream, b'"content":"')
        held = []

        def hold(route: Route) -> None:
            held.append(route)

        page.route("**/cancel", hold)
        button = page.locator("#requests button.cancel")
        button.click()
        expect(button).to_have_text("Stopping")
        expect(button).to_be_disabled()
        page.wait_for_timeout(1500)
        expect(button).to_have_text("Stopping")
        held[0].continue_()
        assert b"request_cancelled" in until(stream, b"\r\n0\r\n\r\n")
        expect(page.locator("#requests li")).to_have_count(0)


def test_a_long_prompt_shows_its_progress(
    scripted: ScriptedServer, open_page: Open, picture: Picture
) -> None:
    scripted.rules({"when": "", "pieces": ["x"], "prefill": 60})
    page = open_page(scripted.url)
    long = ENDLESS | {"messages": [{"role": "user", "content": "word " * 3000}]}
    with contextlib.closing(post(scripted.port, long)) as stream:
        until(stream, b'"role":"assistant"')
        row = page.locator("#requests li")
        expect(row.locator(".stage")).to_have_text("Reading")
        expect(row.locator(".done")).to_have_text(re.compile(r"^[1-9]\d? % of the prompt$"))
        expect(row.locator(".left")).to_have_text(re.compile(r"^\d+ s left$"))
        expect(row.locator(".why")).to_have_text("diverged at token 0")
        assert float(re.sub("[^0-9.]", "", row.locator(".new").get_attribute("style") or "")) > 0
        picture(page, "a long prompt")


def test_clear_asks_and_clears(demo: WholeServer, open_page: Open) -> None:
    demo.ask("a prompt that is kept " * 30, 3)
    page = open_page(demo.url)
    tree = page.locator("#tree tr")
    expect(tree.first).to_be_visible()
    expect(page.locator("#hits")).to_have_text(re.compile(r"\d+ % of all prompt tokens"))
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Keep it").click()
    page.wait_for_timeout(1200)
    expect(tree.first).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("dialog").get_by_role("button", name="Clear").click()
    expect(page.locator("#toast")).to_have_text("The prompt cache was cleared.")
    expect(tree).to_have_count(0)
    expect(page.locator("#bare")).to_be_visible()
    expect(page.locator("#evicted")).to_have_text(re.compile("by hand"))


def test_the_tree_is_told_branch_by_branch(demo: WholeServer, open_page: Open) -> None:
    node = {"start": 0, "tokens": 8, "bytes": 10**6, "checkpoints": 1, "hits": 2, "age": 1, "borrowed": False}
    parents = {1: None, 2: 1, 3: 1, 4: 2, 5: 3, 6: None}

    def answer(route: Route) -> None:
        told = route.fetch().json()
        told["cache"]["tree"] = [node | {"id": id, "parent": up, "start": id} for id, up in parents.items()]
        route.fulfill(json=told)

    page = open_page("about:blank")
    page.route("**/v1/status", answer)
    page.goto(demo.url)
    rows = page.locator("#tree tr")
    expect(rows).to_have_text([re.compile(f"^{id}–{id + 8}1.0 MB") for id in (1, 2, 4, 3, 5, 6)])
    assert [row.get_attribute("data-depth") for row in rows.all()] == ["0", "1", "1", "1", "1", "0"]
    page.unroute_all(behavior="wait")


def test_the_chat_streams_from_the_demo_model(demo: WholeServer, open_page: Open, picture: Picture) -> None:
    page = open_page(demo.url)
    state(page, "Ready")
    page.get_by_label("Message").fill("Tell me of the river")
    page.get_by_label("Message").press("Enter")
    said = page.locator(".said > .text")
    expect(said).not_to_be_empty()
    picture(page, "chat")
    expect(page.locator(".said .state")).to_have_text(re.compile("tok/s"))
    expect(page.locator(".asked")).to_have_text("Tell me of the river")
    expect(page.locator("#send")).to_be_visible()


def test_the_chat_folds_reasoning_tells_its_speed_and_stops(
    scripted: ScriptedServer, open_page: Open
) -> None:
    thought = ["<think>", "deep ", "water ", "</think>"]
    scripted.rules(
        {"when": "for ever", "pieces": ["again "] * 500, "step": 0.05},
        {"when": "", "pieces": [*thought, "<b>not bold</b> ", *["fine "] * 6], "step": 0.1},
    )
    page = open_page(scripted.url)
    state(page, "Ready")
    message, said = page.get_by_label("Message"), page.locator(".said")
    message.fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(said.locator("> .text")).to_have_text(re.compile("fine"))
    lengths = {len(said.locator("> .text").inner_text()) for _ in range(20) if not page.wait_for_timeout(50)}
    expect(said.locator(".state")).to_have_text(
        re.compile(r"^\d+ tokens · [\d.]+ tok/s · 0 of \d+ prompt tokens cached · first after [\d.]+ s$")
    )
    assert len(lengths) > 1, "it was written bit by bit"
    expect(said.locator("> .text")).to_have_text(re.compile(r"<b>not bold</b> fine"))
    expect(said.locator("details .text")).to_be_hidden()
    said.locator("summary").click()
    expect(said.locator("details .text")).to_have_text(re.compile("deep water"))
    message.fill("go on for ever")
    message.press("Enter")
    expect(said.nth(1).locator("> .text")).to_have_text(re.compile("again again"))
    page.get_by_role("button", name="Stop").click()
    expect(said.nth(1).locator(".state")).to_have_text("Stopped.")
    scripted.until(lambda: not json.loads(_get(scripted.url + "/v1/status"))["requests"])
    page.get_by_role("button", name="New chat").click()
    expect(said).to_have_count(0)


def test_the_chat_tells_what_went_wrong(scripted: ScriptedServer, open_page: Open, errors: list[str]) -> None:
    scripted.rules({"when": "late", "pieces": ["half "], "reason": "error"})
    page = open_page(scripted.url)
    state(page, "Ready")
    for text, words in (("refuse this", "refuses"), ("too late", "ran out of memory")):
        page.get_by_label("Message").fill(text)
        page.get_by_label("Message").press("Enter")
        expect(page.locator(".state.failed").last).to_have_text(re.compile(words))
    assert any("400" in error for error in errors), "the browser's own word on the refusal"
    errors.clear()


def _get(url: str) -> str:
    import urllib.request

    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read(), "utf-8")


def test_a_key_is_asked_for_and_kept_nowhere(
    tmp_path: Path, open_page: Open, errors: list[str], picture: Picture
) -> None:
    server = ScriptedServer(write_client_model(tmp_path / "model"), tmp_path, "--api-key", "open-sesame")
    with server:
        page = open_page(server.url)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(page.locator("main")).to_be_hidden()
        picture(page, "key")
        field.fill("wrong")
        field.press("Enter")
        expect(page.locator("#keyerror")).to_have_text("That is not the key of this server.")
        field.fill("open-sesame")
        field.press("Enter")
        expect(page.locator("main")).to_be_visible()
        state(page, "Ready")
        page.get_by_label("Message").fill("Hello")
        page.get_by_label("Message").press("Enter")
        expect(page.locator(".said > .text")).to_have_text("fine")
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        assert "sesame" not in page.evaluate(kept)
        assert "sesame" not in page.locator("#setup").inner_text()
        assert all("401" in error for error in errors), "the browser's own word on a refused request"
        errors.clear()


def test_silence_is_told_and_what_was_heard_stays(
    scripted: ScriptedServer, open_page: Open, errors: list[str], picture: Picture
) -> None:
    page = open_page(scripted.url)
    state(page, "Ready")
    page.context.set_offline(True)
    state(page, "cannot be reached")
    expect(page.locator("#detail")).to_have_text(re.compile(r"What you see is from .*Next try in \d+ s\."))
    expect(page.locator("body.stale main")).to_be_visible()
    assert page.locator("h1").inner_text().strip()
    picture(page, "unreachable")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try now").click()
    state(page, "Ready")
    expect(page.locator("body.stale")).to_have_count(0)
    assert all("ERR_INTERNET_DISCONNECTED" in error for error in errors)
    errors.clear()


def test_an_engine_that_died_is_told_of_and_marked(
    demo: WholeServer, open_page: Open, picture: Picture
) -> None:
    page = open_page(demo.url)
    state(page, "Ready")
    told: list[dict[str, object]] = []

    def while_it_starts(route: Route) -> None:
        route.fulfill(json=told[0]) if told else route.continue_()

    page.route("**/v1/status", while_it_starts)
    os.kill(demo.health()["engine"]["pid"], signal.SIGKILL)
    told.append(_status_without_engine(demo))  # held: the engine is often back before the page asks again
    state(page, "starting again")
    picture(page, "engine died")
    page.unroute_all(behavior="wait")
    expect(page.locator("#events li[data-level=error] .what")).to_have_text(re.compile("SIGKILL"))
    expect(page.locator("#events .advice").first).not_to_be_empty()
    expect(page.get_by_role("img", name="Error", exact=True)).to_be_visible()
    state(page, "Ready")
    expect(page.locator("#plot text.sign.death").first).to_have_text("✕")


def _status_without_engine(server: WholeServer) -> dict[str, object]:
    end = time.monotonic() + 30
    while (status := server.get("/v1/status").body).get("state", "ready") == "ready":
        assert time.monotonic() < end, "it never said that its engine is gone"
    return status


def test_nobody_is_asked_while_nobody_looks(scripted: ScriptedServer, open_page: Open) -> None:
    page = open_page(scripted.url)
    state(page, "Ready")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hide = "at => { Object.defineProperty(document, 'hidden', {value: at, configurable: true});"
    page.evaluate(hide + "document.dispatchEvent(new Event('visibilitychange')); }", True)
    page.wait_for_timeout(1500)
    asked.clear()
    page.wait_for_timeout(3000)
    assert asked == []
    page.evaluate(hide + "document.dispatchEvent(new Event('visibilitychange')); }", False)
    page.wait_for_timeout(1500)
    assert asked


def test_the_keyboard_goes_everywhere(demo: WholeServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.locator("#plot svg").wait_for()
    plot = page.locator("#plot")
    plot.focus()
    page.wait_for_timeout(3000)
    plot.press("ArrowLeft")
    expect(page.locator("#moment")).to_have_text(re.compile("ago: "))
    expect(page.locator("#plot .cursor")).to_have_count(1)
    plot.press("Escape")
    expect(page.locator("#moment")).to_have_text(re.compile("^Now: "))
    page.get_by_role("tab", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Python")).to_be_focused()
    expect(page.get_by_role("tabpanel")).to_have_text(re.compile("from openai import OpenAI"))
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"plot", "message", "send", "setup", "events"} - reached <= {"events"}


def test_a_pointer_shows_the_moment_under_it(demo: WholeServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.locator("#plot svg").wait_for()
    page.wait_for_timeout(3000)
    box = page.locator("#plot").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.97, box["y"] + 80)
    expect(page.locator("#moment")).to_have_text(re.compile("ago: "))
    page.mouse.move(5, 5)
    expect(page.locator("#moment")).to_have_text(re.compile("^Now: "))


def test_what_can_be_copied_works(scripted: ScriptedServer, open_page: Open) -> None:
    scripted.rules()
    page = open_page(scripted.url)
    state(page, "Ready")
    code = page.locator("#setup code")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    curl = page.evaluate("navigator.clipboard.readText()")
    assert curl == code.text_content()
    done = subprocess.run(["bash", "-c", curl], capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "fine"
    page.get_by_role("tab", name="Python").click()
    python = [sys.executable, "-c", code.text_content() or ""]
    assert subprocess.run(python, capture_output=True, check=True, timeout=60).stdout.strip() == b"fine"
    page.get_by_role("tab", name="opencode").click()
    config = json.loads(code.text_content() or "")
    assert config["provider"]["penstock"]["options"]["baseURL"] == scripted.url + "/v1"
    documented = Path("docs/clients.md").read_text(encoding="utf-8")
    page.get_by_role("tab", name="Codex").click()
    written = re.search(r"```toml\n(.*?)```", documented, re.DOTALL)
    assert written
    told = tomllib.loads((code.text_content() or "").replace(scripted.url, "http://127.0.0.1:8080"))
    assert told == tomllib.loads(written[1]) | {"model": "model"}
    page.get_by_role("tab", name="Claude Code").click()
    assert (code.text_content() or "").replace(scripted.url, "http://127.0.0.1:8080") in documented


def test_names_are_text(tmp_path: Path, open_page: Open) -> None:
    name = "<img src=x onerror=alert(1)>'\"&amp;"
    server = ScriptedServer(write_client_model(tmp_path / "model"), tmp_path, "--served-model-name", name)
    with server:
        page = open_page(server.url)
        expect(page.locator("h1")).to_have_text(name)
        assert page.locator("img[src=x]").count() == 0


CONTRAST = """() => {
  const rgb = (text) => { const n = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    const whole = text.startsWith("color") ? n.slice(0, 3).map((x) => x * 255) : n.slice(0, 3);
    return [...whole, n[3] ?? 1]; };
  const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
    .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, at) => sum + x * [0.2126, 0.7152, 0.0722][at], 0);
  const under = (at) => { for (; at; at = at.parentElement) {
    const found = rgb(getComputedStyle(at).backgroundColor); if (found[3] === 1) return found; } };
  const wordy = (at) => [...at.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const both = (at) => [light(rgb(getComputedStyle(at).color)), light(under(at))].sort((x, y) => y - x);
  return [...document.querySelectorAll("body *:not(svg *)")]
    .filter((at) => at.checkVisibility() && wordy(at))
    .map((at) => { const [a, b] = both(at); return [(a + 0.05) / (b + 0.05), at.outerHTML.slice(0, 80)]; })
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_is_readable_at_night_and_on_a_phone(
    demo: WholeServer, open_page: Open, picture: Picture, scheme: str, width: int
) -> None:
    page = open_page(demo.url, width, color_scheme=scheme)
    with contextlib.closing(post(demo.port, ENDLESS)) as stream:
        until(stream, b'"content":"')
        page.locator("#requests li").first.wait_for()
        page.wait_for_timeout(1500)
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for tab in page.get_by_role("tab").all():
            tab.click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 380) == (scheme == "dark")
        picture(page, f"busy {scheme} {width}")


def test_nothing_jumps_when_a_request_comes_and_goes(demo: WholeServer, open_page: Open) -> None:
    page = open_page(demo.url)
    page.locator("#plot svg").wait_for()
    page.wait_for_timeout(1500)
    top = "(at) => Math.round(at.getBoundingClientRect().top)"
    places = f"[...document.querySelectorAll('section')].map({top})"
    before = page.evaluate(places)
    with contextlib.closing(post(demo.port, ENDLESS)) as stream:
        until(stream, b'"content":"', 3)
        page.locator("#requests li").first.wait_for()
        page.wait_for_timeout(1500)
        assert page.evaluate(places) == before
    expect(page.locator("#quiet")).to_be_visible()
    assert page.evaluate(places) == before
