"""What is wrong with a machine, a model or a server, judged from facts. Pure: no clock, no file, no process.

Each function yields findings; one that is not ok says what to change. Invariant: no finding holds another
program's command line, a user's name or a prompt, so that all of them can be pasted in public.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement

from penstock.memory.probe import GiB, Machine, Pressure, Reading
from penstock.sizes import gigabytes

SERVERS = re.compile(
    r"\b(mlx_lm|mlx_vlm|omlx|penstock|ollama|llama-server|LM Studio|vllm|sglang)\b", re.IGNORECASE
)
"""Programs that hold models, as they stand in command lines."""
HOLDS = 200_000_000
"""Bytes from which on such a program counts; less is a shell or an editor."""
FREE_DISK = 10_000_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination. `level`: ok, warn or fail; `change`: what to do about it."""

    area: str
    level: str
    what: str
    change: str = ""


def graded(area: str, what: str, *, warn: bool = False, fail: bool = False, change: str = "") -> Finding:
    """A finding of the gravest level that holds."""
    level = "fail" if fail else "warn" if warn else "ok"
    return Finding(area, level, what, change if warn or fail else "")


def packages(versions: Mapping[str, str | None], needs: Iterable[str]) -> Iterator[Finding]:
    """Installed versions (None: not installed) against requirements such as 'mlx<0.33,>=0.32.3'."""
    for need in map(Requirement, needs):
        if need.name in versions and need.marker is None:
            version = versions[need.name]
            wrong = version is None or not need.specifier.contains(version, prereleases=True)
            words = f"{need.name} {version or 'is not installed'}" + f"; {need.specifier} is needed" * wrong
            yield graded("machine", words, fail=wrong, change=f"install '{need.name}{need.specifier}'")


def memory(machine: Machine, now: Reading, ceiling: int, decided_by: str) -> Iterator[Finding]:
    """What a server may hold, and whether that is free."""
    limits = {"memory": machine.physical, "cgroup": machine.cgroup, "rlimit": machine.rlimit}
    told = ", ".join(f"{name} {gigabytes(limit)}" for name, limit in limits.items() if limit is not None)
    yield graded("machine", f"{told}: a server may hold {gigabytes(ceiling)} ({decided_by})")
    if now.pressure is not Pressure.NORMAL:
        words = f"the system is short of memory (pressure: {now.pressure.name.lower()})"
        yield graded(
            "machine", words, warn=True, change="end other programs; until then there is little cache"
        )
    if now.available is not None and now.available < ceiling / 2:
        words = f"only {gigabytes(now.available)} are free at the moment"
        yield graded("machine", words, warn=True, change="end other programs, or name a --memory-limit")


def wired(machine: Machine) -> Iterator[Finding]:
    """macOS: how much the GPU may hold. Shown, never changed."""
    limit, physical = machine.wired, machine.physical or 0
    if limit is None:
        yield graded("machine", "iogpu.wired_limit_mb is not set: macOS decides what the GPU may hold")
        return
    words = f"iogpu.wired_limit_mb lets the GPU hold {gigabytes(limit)} of {gigabytes(physical)}"
    odd = limit > physical - 4 * GiB or limit < physical // 2
    yield graded("machine", words, warn=odd, change="`sudo sysctl iogpu.wired_limit_mb=0` undoes it")


def others(programs: Iterable[tuple[int, str, int]]) -> Iterator[Finding]:
    """Other programs with models in memory; `programs`: (pid, command line, bytes held)."""
    none = True
    for pid, command, held in programs:
        if held >= HOLDS and (match := SERVERS.search(command)):
            none, words = False, f"{match[1]} (process {pid}) holds {gigabytes(held)}"
            yield graded("machine", words, warn=True, change="end it, or set --memory-limit for both")
    if none:
        yield graded("machine", "no other program holds a model")


def disk(free: int, needed: int) -> Iterator[Finding]:
    """Room where models are downloaded to; `needed`: for the model asked about, 0 if it is here."""
    words = f"{gigabytes(free)} are free where models are kept"
    words += f"; this one needs {gigabytes(needed)}" if needed else ""
    change = "make room, or set HF_HOME to another disk"
    yield graded("machine", words, warn=free < FREE_DISK, fail=free < needed, change=change)


def fits(plan: Mapping[str, Any]) -> Iterator[Finding]:
    """What `penstock plan` says of the model."""
    words = f"weights {gigabytes(plan['weights_bytes'])} of {gigabytes(plan['ceiling_bytes'])}"
    longest = plan["longest"] if plan["fits"] else 0
    words += f", the longest context is {longest:,} tokens" if longest else ": no room to compute is left"
    short = longest < min(8_192, plan["context_length"]) if longest else True
    change = "take a smaller or more strongly quantised model"
    yield graded("model", words, warn=short, fail=not longest, change=change)


def server(status: int, body: Mapping[str, Any], theirs: str | None, mine: str) -> Iterator[Finding]:
    """A running server's own words: status and body of /health, and its version if it is a penstock."""
    if theirs is None:
        yield graded("server", "it answers, and is no penstock: nothing more to ask")
        return
    yield graded(
        "server", f"penstock {theirs}", warn=theirs != mine, change=f"start it again, to have {mine}"
    )
    loading = body.get("status") == "loading"
    words = f"it is {body.get('status', 'silent')}, with {body.get('model') or body.get('reason')}"
    yield graded("server", words, warn=loading, fail=status != 200 and not loading, change="look at its log")
    if deaths := body.get("engine_deaths"):
        change = "run `penstock doctor --self-test`, and report it with the lines of the log"
        yield graded("server", f"its engine has died {deaths} times", warn=True, change=change)
    memory = body.get("memory") or {}
    if memory.get("budget", 0) < memory.get("ceiling", 0):
        words = f"its budget is {gigabytes(memory['budget'])} of {gigabytes(memory['ceiling'])} for now"
        yield graded("server", words, warn=True, change="end other programs: the system is short of memory")
