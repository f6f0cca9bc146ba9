"""`penstock bench` from its flags to its files and exit code; the playing itself is tests/traffic's."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import fake_backend

from penstock import cli
from penstock.cli.bench import named
from penstock.traffic import trace
from penstock.traffic.profiles import issue1390, to_lines


@pytest.fixture
def server() -> Iterator[fake_backend.Server]:
    with fake_backend.serving(fake_backend.say("so it is")) as running:
        yield running


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_profile_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--events", "--scale", "0.05", "--sessions", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().out == to_lines(issue1390(3, 0.05, 2))


def test_a_trace_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 4000, "input_length": 600, "output_length": 9, "hash_ids": [1, 2]}\n' * 2)
    assert cli.main(["bench", "--events", "--trace", str(path), "--speed", "2", "--seed", "5"]) == 0
    assert capsys.readouterr().out == to_lines(trace.load(path, speed=2, seed=5))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "http://a", "--url", "http://b", "--pid", "7"], "--pid: one for each"),
        (["--url", "http://a", "--model", "m", "--model", "n"], "--model: one, or one for each"),
        (["--url", "http://a"] * 5, "four servers at most"),
        (["--trace", "no/such/file"], "No such file"),
    ],
)
def test_what_cannot_be_played_is_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("penstock: ")
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("address", ["ftp://x/v1", "nonsense", "a=nonsense", "http://", ""])
def test_what_is_no_address_is_refused(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--url", address])
    assert ended.value.code == 2
    assert "argument --url: must be an address such as http://127.0.0.1:8080/v1" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--scale", "--speed", "--sessions", "--rounds", "--timeout", "--block"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_amounts_are_above_zero(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", flag, value])
    assert ended.value.code == 2
    assert f"argument {flag}: " in capsys.readouterr().err


def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text("{}\n")
    assert cli.main(["bench", "--trace", str(tmp_path / "t.jsonl")]) == 2
    assert "t.jsonl:1: timestamp must be" in capsys.readouterr().err


@pytest.mark.usefixtures("no_key")
def test_a_server_that_is_not_there_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # not listening: refused at once
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert cli.main(["bench", "--url", url]) == 2
    assert f"penstock: {url}/v1 cannot be reached" in capsys.readouterr().err


@pytest.mark.usefixtures("no_key")
def test_two_servers_in_one_run(
    server: fake_backend.Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{server.port}"
    trace_file = tmp_path / "t.jsonl"
    row = '{"timestamp": 0, "input_length": %d, "output_length": 4, "hash_ids": [1]}\n'
    trace_file.write_text("".join(row % length for length in (20, 30, 40)))
    asked = ["bench", "--url", f"one={url}", "--url", f"two={url}/v1", "--trace", str(trace_file)]
    asked += ["--rounds", "2", "--pid", str(os.getpid()), "--pid", str(os.getpid())]
    asked += ["--json", str(tmp_path / "f.json"), "--html", str(tmp_path / "f.html")]
    assert cli.main(asked) == 0
    shown = capsys.readouterr().out
    assert "t.jsonl × 1, seed 0, rounds: 2; one serves fake" in shown
    assert "two : one" in shown
    written = json.loads((tmp_path / "f.json").read_text())
    assert list(written["runs"]) == ["one", "two"]
    for name, rounds in written["runs"].items():
        assert len(rounds) == 2
        assert written["summary"][name]["lost"] == 0
        assert written["summary"][name]["peak_bytes"] > 1_000_000
        assert all(type(record["text"]) is int for run in rounds for record in run["records"])
    asked_for = Counter(bytes(run.job.prompt) for run in server.backend.runs if run.job.max_tokens == 4)
    assert list(asked_for.values()) == [2] * 6, "three texts a round, each to both; other texts in each round"
    assert (tmp_path / "f.html").read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("no_key")
def test_two_servers_need_two_names(server: fake_backend.Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.port}"
    assert cli.main(["bench", "--url", url, "--url", url]) == 2
    assert "two servers are called" in capsys.readouterr().err


def test_a_server_has_a_name_and_a_path() -> None:
    assert named("http://h:1") == ("h:1", "http://h:1/v1")
    assert named("http://h:1/api/v3/") == ("h:1", "http://h:1/api/v3")
    assert named("ours=https://h") == ("ours", "https://h/v1")
    assert named("http://h/x?a=b") == ("h", "http://h/x?a=b")
