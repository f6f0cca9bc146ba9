"""The page's modules, checked by TypeScript's compiler, and what they take the server to answer."""

from __future__ import annotations

import re
import subprocess

import msgspec
import pytest
from tests.support import npm

from penstock import status, wire
from penstock.api.dashboard import FILES
from penstock.dashboard import FOLDER
from penstock.memory.ledger import Account

TYPESCRIPT = "7.0.2"
OPTIONS = (
    "--strict --checkJs --noEmit --noUnusedLocals --noUnusedParameters --noImplicitReturns --target esnext "
    "--module esnext --moduleResolution bundler --lib esnext,dom,dom.iterable,dom.asynciterable"
)


@pytest.mark.browser
def test_the_types_of_the_modules_agree() -> None:
    compiler = npm.installed(f"typescript@{TYPESCRIPT}", "typescript/bin/tsc")
    if compiler is None:
        pytest.skip("npm is not here")
    checked = subprocess.run(
        [compiler, *OPTIONS.split(), *FOLDER.glob("*.js")], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize(
    "name", re.findall(r"interface (\w+)", FOLDER.joinpath("shapes.d.ts").read_text(encoding="utf-8"))
)
def test_what_the_page_reads_is_what_the_server_says(name: str) -> None:
    told = getattr(status, name, None) or getattr(wire, name)
    text = FOLDER.joinpath("shapes.d.ts").read_text(encoding="utf-8")
    body = re.search(rf"interface {name} {{(.*?)\n}}", text, re.DOTALL)
    assert body
    read = dict(re.findall(r"(\w+): (.*);", body[1]))
    fields = {field.name: field.type for field in msgspec.structs.fields(told)}
    assert read.keys() <= fields.keys()
    nullable = {name for name in read if type(None) in getattr(fields[name], "__args__", ())}
    assert {name for name, type in read.items() if type.endswith("| null")} == nullable


def test_every_owner_of_memory_is_in_the_picture() -> None:
    drawn = re.search(
        r"const OWNERS = \[(.*?)\n\];", FILES["/dashboard/loadline.js"].body.decode(), re.DOTALL
    )
    assert drawn
    assert set(re.findall(r'\["(\w+)"', drawn[1])) == {account.value for account in Account}
    style = FILES["/dashboard/style.css"].body.decode()
    assert all(f".{account.value} " in style and f"--{account.value}:" in style for account in Account)


def test_nothing_is_parsed_as_html_or_loaded_from_elsewhere() -> None:
    for path, file in FILES.items():
        text = file.body.decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|srcdoc", text), (
            path
        )
        hosts = set(re.findall(r"(?:https?:)?//([\w.-]+\.\w+)", text))
        assert hosts <= {"www.w3.org"}, path
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", text), path
        assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", text), path
