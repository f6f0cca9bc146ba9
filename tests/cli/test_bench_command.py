"""`penstock bench` from its flags to its exit code; the playing itself is tests/traffic's."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from penstock import cli
from penstock.traffic.profiles import issue1390, to_lines


def test_a_profile_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--events", "--scale", "0.05", "--sessions", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().out == to_lines(issue1390(3, 0.05, 2))


@pytest.mark.parametrize("flags", [["--url", "ftp://x/v1"], ["--url", "nonsense"], ["--scale", "0"]])
def test_what_cannot_be_played_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *flags]) == 2
    assert capsys.readouterr().err.startswith("penstock: --url must be")


def test_a_server_that_is_not_there_loses_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as bound:  # not listening: refused at once
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        asked = ["bench", "--url", url, "--scale", "0.001", "--sessions", "1"]
        assert cli.main([*asked, "--json", str(tmp_path / "f.json")]) == 1
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["summary"]["lost"] == len({(r["session"], r["turn"]) for r in written["records"]})
    assert written["summary"]["errors"] == {"refused": len(written["records"])}
    assert "peak memory" in capsys.readouterr().out
