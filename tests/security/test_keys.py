"""API keys against the server: who has none gets nothing, each has its own cache, none is ever shown."""

from __future__ import annotations

import ast
import inspect
import json
import os
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.whole_server import PENSTOCK, WholeServer

from penstock import cli, config
from penstock.api import security
from penstock.cli import serve
from penstock.errors import StartProblem
from penstock.models import DEMO

ALPHA, BETA, GAMMA = "alpha-7f1c2d", "beta-9b3e4a", "gamma-5d6f8c"
WRONG = "wrong-0a1b2c"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    """The demo model with a key of the command line, one of the environment's place and one of a file."""
    scratch = tmp_path_factory.mktemp("keyed")
    file = scratch / "keys"
    file.write_text(f"# of the house\n\n{BETA}\n  {GAMMA}  \n")
    file.chmod(0o644)
    flags = ("--api-key-file", str(file), "--log-level", "DEBUG")
    with WholeServer(DEMO, scratch, *flags, environment={"PENSTOCK_API_KEY": ALPHA}) as running:
        yield running
        assert running.stop() == 0, running.log()[-3000:]


def call(
    server: WholeServer, path: str, key: str | None, body: Any = None, *, header: str = "Authorization"
) -> tuple[int, str, dict[str, Any]]:
    """Status, headers and body as one text, and the body as JSON."""
    request = urllib.request.Request(server.url + path, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if key is not None:
        request.add_header(header, f"Bearer {key}" if header == "Authorization" else key)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, headers, text = answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            status, headers, text = refused.code, refused.headers, refused.read().decode()
    return status, f"{headers}\n{text}", json.loads(text)


def cached(server: WholeServer, key: str, prompt: str) -> int:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 2, "temperature": 0}
    status, _, answer = call(server, "/v1/chat/completions", key, body)
    assert status == 200, answer
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("key", [ALPHA, BETA, GAMMA], ids=["environment", "file", "file again"])
@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_each_key_is_let_in(server: WholeServer, key: str, header: str) -> None:
    assert call(server, "/v1/models", key, header=header)[0] == 200


@pytest.mark.parametrize(
    "key",
    [None, "", WRONG, ALPHA[:-1], ALPHA + "x", f"{ALPHA},{BETA}", "# of the house"],
    ids=["none", "empty", "wrong", "shorter", "longer", "two at once", "a comment"],
)
def test_nothing_else_is(server: WholeServer, key: str | None) -> None:
    for path in ("/v1/models", "/v1/status", "/openapi.json", "/nothing"):
        assert call(server, path, key)[0] == 401, path
    assert call(server, "/health", key)[0] == 200


def test_a_key_never_sees_what_another_keys_prompts_left(server: WholeServer) -> None:
    assert cached(server, ALPHA, PROMPT) == 0
    again = cached(server, ALPHA, PROMPT)
    assert again > 100
    assert cached(server, BETA, PROMPT) == 0
    assert cached(server, BETA, PROMPT) == again
    assert cached(server, GAMMA, PROMPT) == 0


def test_no_key_is_shown_by_the_log_by_answers_or_by_processes(server: WholeServer) -> None:
    shown = [
        server.log(),
        *(call(server, path, ALPHA)[1] for path in ("/health", "/v1/status", "/openapi.json")),
    ]
    for key in (WRONG, ALPHA):
        for path, body in (
            ("/v1/chat/completions", {"messages": 1}),
            ("/nothing", None),
            ("/v1/models", None),
        ):
            shown.append(call(server, path, key, body)[1])
    front = server.process.pid
    engine = server.health()["engine"]["pid"]
    shown.append(server.log())
    for pid, file in ((front, "cmdline"), (engine, "cmdline"), (engine, "environ")):
        path = Path(f"/proc/{pid}/{file}")
        if path.exists():
            shown.append(path.read_text(errors="replace"))
    for key in (ALPHA, BETA, GAMMA, WRONG):
        assert not [text[text.index(key) - 40 :][:90] for text in shown if key in text]


def test_a_key_file_that_others_can_read_is_said(server: WholeServer) -> None:
    assert "holds API keys, and others can read it" in server.log()


def test_the_printed_configuration_shows_none() -> None:
    command = [*PENSTOCK, "serve", "--print-config", "--api-key", BETA]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PENSTOCK_API_KEY": ALPHA}
    )
    assert "# api_key is set by --api-key" in done.stdout
    assert ALPHA not in done.stdout + done.stderr
    assert BETA not in done.stdout + done.stderr


def test_errors_about_keys_show_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    for text in (f"{ALPHA}\n{BETA} {GAMMA}\n", f"{ALPHA},{BETA}\n", f"{ALPHA}ö\n"):
        file.write_text(text)
        assert cli.main(["serve", "m", "--api-key-file", str(file)]) == 2
    assert cli.main(["serve", "m", "--api-key", f"{ALPHA} {BETA}"]) == 2
    said = capsys.readouterr().err
    assert "line 2: a key is visible ASCII" in said
    assert not [key for key in (ALPHA, BETA, GAMMA) if key in said]
    assert ALPHA not in repr(config.Options(api_key=(ALPHA,)))


@pytest.mark.parametrize("text", ["", "\n# nothing but comments\n"])
def test_a_key_file_without_a_key_opens_no_door(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(StartProblem, match="holds no key"):
        serve.with_key_file(config.Options(api_key_file=str(file)))


def test_keys_of_several_places_and_a_file_add_up(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\r\n# a\r\nthree\r\n")
    file.chmod(0o600)
    resolved = config.resolve({"api_key": "one,two", "api_key_file": str(file)}, {}, {})
    assert serve.with_key_file(resolved.options).api_key == ("one", "two", "three")
    assert not serve.others_can_read(str(file))
    file.chmod(0o600 | stat.S_IROTH)
    assert serve.others_can_read(str(file))


def test_keys_are_compared_in_constant_time_and_all_of_them() -> None:
    """No equality on a key's bytes, no way out of the comparison before the last key."""
    source = ast.parse(inspect.cleandoc("\n" + inspect.getsource(security.Gate._check_key)))
    called = {
        node.func.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert "compare_digest" in called
    compared = [ast.unparse(node) for node in ast.walk(source) if isinstance(node, ast.Compare)]
    assert compared == ["scheme.lower() == b'bearer'"]
    assert not [
        node for node in ast.walk(source) if isinstance(node, (ast.Break, ast.Return, ast.GeneratorExp))
    ]


def test_the_name_of_a_keys_cache_is_not_the_digest_it_is_known_by() -> None:
    gate = security.Gate("127.0.0.1", [], [], [ALPHA, BETA])
    names = [cache for _, cache in gate._keys]
    assert len(set(names)) == 2
    assert not {digest.hex() for digest, _ in gate._keys} & set(names)
    assert not [name for name in names if ALPHA in name or BETA in name]


def test_without_a_key_on_loopback_a_client_that_sends_none_is_served(tmp_path: Path) -> None:
    """As an editor does whose settings for a local model have a port and no key."""
    with WholeServer(DEMO, tmp_path) as open_server:
        assert call(open_server, "/v1/models?", None)[0] == 200
        assert cached(open_server, "whatever it sends", "hello") == 0
