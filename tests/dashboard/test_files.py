"""What is answered at `/` and `/dashboard/...`: to whom, with which headers, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.support.fake_backend import serving

from penstock.config import Options
from penstock.dashboard import FILES, FOLDER

ROOT = Path(__file__).parents[2]
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_browsers_get_the_page_and_others_what_they_always_got() -> None:
    with serving() as server, server.client() as client:
        page = client.get("/", headers=BROWSER)
        probe = client.head("/")
        page_probe = client.head("/", headers=BROWSER)
        plain = client.get("/", headers={"Accept": "*/*"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == FILES["/"].body
    assert {answer.status_code for answer in (page, probe, page_probe, plain)} == {200}
    assert plain.json() == {"server": "penstock", "model": "org/fake", "api": "/v1"}
    assert {answer.headers["vary"] for answer in (page, plain)} == {"accept"}
    assert probe.content == page_probe.content == b""


def test_every_file_is_served_under_a_strict_policy_and_asked_for_again() -> None:
    assert {"/", "/dashboard/main.js", "/dashboard/style.css", "/dashboard/icon.svg"} <= FILES.keys()
    with serving() as server, server.client() as client:
        for path, file in FILES.items():
            answer = client.get(path, headers=BROWSER)
            assert (answer.status_code, answer.content) == (200, file.body)
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert answer.headers["cache-control"] == "no-cache"
            again = client.get(path, headers=BROWSER | {"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == answer.headers["etag"]
            assert "content-length" not in again.headers


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard",
        "/dashboard/",
        "/dashboard/index.html",
        "/dashboard/__init__.py",
        "/dashboard/shapes.d.ts",
        "/dashboard/..%2f__init__.py",
        "/dashboard/%2e%2e/config.py",
        "/dashboard//main.js",
        "/dashboard/MAIN.JS",
    ],
)
def test_there_is_nothing_under_other_names(path: str) -> None:
    with serving() as server, server.client() as client:
        assert client.get(path, headers=BROWSER).status_code == 404


def test_the_page_needs_no_key_and_its_data_do() -> None:
    with serving(options=Options(port=0, api_key=("secret",))) as server, server.client() as client:
        assert {client.get(path, headers=BROWSER).status_code for path in FILES} == {200}
        for path in ("/v1/status", "/v1/status/history", "/v1/models"):
            assert client.get(path, headers=BROWSER).status_code == 401
        for path in ("/v1/cache/clear", "/v1/requests/x/cancel"):
            assert client.post(path, json={}).status_code == 401


def test_another_origin_and_a_name_bound_anew_get_no_page() -> None:
    with serving() as server, server.client() as client:
        assert client.get("/", headers=BROWSER | {"Host": "evil.example"}).status_code == 403
        assert client.get("/", headers=BROWSER | {"Origin": "http://evil.example"}).status_code == 403


def test_a_wheel_holds_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {f"penstock/dashboard/{path.name}" for path in FOLDER.iterdir() if path.is_file()}
    assert files <= packed
    assert len(FILES) < len(files)
