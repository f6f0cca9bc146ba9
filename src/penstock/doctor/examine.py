"""Where the doctor's facts come from: this machine, the model's files, a server that runs. Changes nothing.

Refuses: loading MLX here; what only it can tell is in the figures of `penstock plan`, from a process of its
own. Whatever cannot be read is a finding, never an exception.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from penstock import __version__, models, platform, weights
from penstock.doctor import checks
from penstock.doctor.checks import Finding, graded
from penstock.memory.probe import system_probe
from penstock.text.parts import TextParts
from penstock.traffic.client import ServerProblem, get, served_model


def machine(plan: Mapping[str, Any], needed: int) -> Iterator[Finding]:
    """Back end, memory, other programs, disk. `plan`: figures of any model; `needed`: bytes to download."""
    yield graded("machine", f"{plan['machine']}, MLX on {plan['backend']}")
    needs = (metadata.requires("penstock") or []) if version("penstock") else []
    yield from checks.packages({name: version(name) for name in ("mlx", "mlx-lm")}, needs)
    if platform.backend() == "cpu" and sys.platform == "linux":
        there = platform.openblas() is not None
        words = f"OpenBLAS is {'' if there else 'not '}installed"
        yield graded("machine", words, warn=not there, change=platform.OPENBLAS_HINT)
    probe, own = system_probe(), os.getpid()
    yield from checks.memory(probe.machine(), probe.read(own), plan["ceiling_bytes"], plan["decided_by"])
    if sys.platform == "darwin":
        yield from checks.wired(probe.machine())
    programs = [(pid, command) for pid, command in platform.programs() if pid != own]
    yield from checks.others((pid, words, probe.read(pid).footprint or 0) for pid, words in programs)
    cache = models.hub_cache()
    place = next(place for place in (cache, *cache.parents) if place.exists())
    yield from checks.disk(shutil.disk_usage(place).free, needed)


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def model(path: Path, *, trust_remote_code: bool = False) -> Iterator[Finding]:
    """The files of a model's directory: all there, readable, and with a template."""
    try:
        models.check(path, trust_remote_code=trust_remote_code)
        sizes = [weights.check(file) for file in path.glob(models.WEIGHTS)]
        parts = TextParts.load(path)
    except (models.ModelProblem, ValueError, OSError) as problem:
        words = str(problem).replace(str(path), path.name).rstrip(".")
        yield graded("model", words, fail=True, change="download it again, or take another model")
        return
    yield graded("model", f"weight files: {len(sizes)}, {sum(sizes) / 1e9:,.2f} GB, all there")
    bare = parts.template.source is None
    words = "it has no chat template: only completions work" if bare else "its chat template is readable"
    yield graded("model", words, warn=bare, change="name one with --chat-template")


def server(url: str, key: str | None) -> Iterator[Finding]:
    """A running server. `url` ends in /v1."""
    root = url.removesuffix("/v1")
    try:
        served_model(url, key)
        described = get(root, "/openapi.json", key)[1].get("info") or {}
        status, body = get(root, "/health", key)
    except ServerProblem as problem:
        words = str(problem).rstrip(".")
        yield graded("server", words, fail=True, change="`penstock serve MODEL` starts one")
        return
    theirs = described.get("version") if described.get("title") == "Penstock" else None
    yield from checks.server(status, body, theirs, __version__)
