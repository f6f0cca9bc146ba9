"""What computes here, on machines that lack something."""

from __future__ import annotations

import tempfile

import pytest

from penstock.engine import device


def test_without_a_place_for_temporary_files_it_starts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk must not keep an engine from coming back."""

    def nowhere(**named: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", nowhere)
    assert device.facts().used > 0
