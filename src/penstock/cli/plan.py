"""`penstock plan`: what a machine holds of a model, by the server's own arithmetic, with nothing loaded.

Refuses: loading weights, and downloading them; of a model on the hub only its description is read. Exit
codes: 0 if the model fits, 1 if it does not, 2 for what only the user can mend.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 300.0
"""What describing a model may take; building a large mixture's empty layers takes some."""


def add(commands: Any) -> None:
    """Add the parser of `penstock plan` to argparse's sub-commands."""
    parser = commands.add_parser(
        "plan",
        help="tell what a machine holds of a model: longest prompt, sessions, cache",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, or the name of a repository on the hub")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="ask for a Mac with this much memory, such as 48G, instead of this machine",
    )
    parser.add_argument("--memory-limit", metavar="SIZE", help="as for penstock serve")
    parser.add_argument("--trust-remote-code", action="store_true", help="as for penstock serve")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(asked: argparse.Namespace) -> int:
    """Print what fits."""
    from penstock import models, platform
    from penstock.sizes import parse_size, physical_memory

    try:
        if sentence := platform.backend_problem():
            raise ValueError(sentence)
        mac = parse_size(asked.memory) if asked.memory else None
        limit = parse_size(asked.memory_limit, whole=physical_memory()) if asked.memory_limit else None
        with described(asked.model, asked.trust_remote_code) as (path, tensors):
            found = figures(path, tensors, mac=mac, limit=limit, trusted=asked.trust_remote_code)
    except (models.ModelProblem, ValueError, OSError) as problem:
        print(f"penstock: {problem}", file=sys.stderr)
        return getattr(problem, "exit_code", 2)
    found = {"model": asked.model, **found}
    print(json.dumps(found, indent=1) if asked.json else table(found))
    return 0 if found["fits"] else 1


@contextmanager
def described(model: str, trusted: bool) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The directory with the model's config, and its tensors' headers if its weights are on the hub alone."""
    from penstock import models

    here = models.precheck(model, trust_remote_code=trusted)
    if here is not None:
        yield here, None
        return
    with tempfile.TemporaryDirectory(prefix="penstock-plan-") as folder:
        yield Path(folder), models.describe_remote(model, Path(folder))


def figures(
    path: Path,
    tensors: dict[str, Any] | None = None,
    *,
    mac: int | None = None,
    limit: int | None = None,
    trusted: bool = False,
) -> dict[str, Any]:
    """The figures, from a process of its own that builds the model without its weights.

    `mac`: of a Mac with so many bytes; `limit`: as --memory-limit. Raises ValueError with a sentence.
    """
    from penstock import platform, weights
    from penstock.config import Options
    from penstock.memory.estimate import working_set
    from penstock.memory.probe import Machine, system_probe
    from penstock.supervisor.budget import ceiling

    command = [*platform.PYTHON, "-m", "penstock.engine.describe"]
    environment, pipe = platform.engine_environment(os.environ), subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as process:
        assert process.stdout is not None
        device = json.loads(process.stdout.readline() or "{}")
        if not device:
            raise ValueError("the engine could not be started; its messages are above.")
        if mac is not None:
            device |= {"backend": "metal", "name": f"a Mac with {mac / 1e9:g} GB", "used": 0}
            machine = Machine(physical=mac, device=working_set(mac))
        else:
            machine = system_probe().machine()
        top = ceiling(machine, device=machine.device or device["limit"], asked=limit, used=device["used"])
        options = Options()
        question = {
            "model_path": str(path),
            "trust_remote_code": trusted,
            "ceiling": top.size,
            "backend": device["backend"],
            "here": mac is None,
            "decode_concurrency": options.decode_concurrency,
            "prefill_step_size": options.prefill_step_size,
        }
        if tensors is not None:
            size = weights.resident(tensors, widened=device["backend"] == "cpu")
            question |= {"weights": size, "dtype": weights.main_dtype(tensors)}
        answer, _ = process.communicate(json.dumps(question) + "\n", timeout=SECONDS)
    found = json.loads(answer or "{}")
    if "fits" not in found:
        raise ValueError(found.get("problem", "the model could not be built; the messages are above."))
    facts = {"machine": device["name"], "backend": device["backend"], "decided_by": top.decided_by}
    return {**facts, **found}


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    from penstock.sizes import gigabytes

    fixed = f" + {gigabytes(size)} a sequence" if (size := found["fixed_bytes_per_sequence"]) else ""
    lines = [
        f"{found['model']} on {found['machine']}",
        f"  may be used     {gigabytes(found['ceiling_bytes'])} ({found['decided_by']})",
        f"  weights         {gigabytes(found['weights_bytes'])}",
        f"  KV              {found['kv_bytes_per_token'] / 1e3:,.1f} KB a token{fixed}",
    ]
    if not found["fits"]:
        return "\n".join([*lines, "It does not fit: the weights leave no room to compute."])
    most = found["context_length"]
    bound = "the model's own" if found["longest"] == most else f"of {most:,}"
    lines.append(f"  longest context {found['longest']:,} tokens ({bound})")
    if found["sessions"]:
        lines.append(f"  {'sessions of':<15}" + "".join(f"{int(n) // 1000:>8}k" for n in found["sessions"]))
        rows = {
            "at once": [str(s["at_once"] or "none") for s in found["sessions"].values()],
            "cache beside 1": [
                gigabytes(s["cache_bytes"]) if s["at_once"] else "-" for s in found["sessions"].values()
            ],
        }
        lines += [f"  {name:<15}" + "".join(f"{cell:>9}" for cell in cells) for name, cells in rows.items()]
    how = {
        "measured": "Steps were measured by a server on this machine.",
        "estimated": "Steps are estimated, on the safe side: a server measures them at its first start.",
    }
    return "\n".join([*lines, how[found["steps"]]])
