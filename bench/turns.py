"""`python -m bench.turns`: a conversation that grows, turn by turn, against both servers side by side.

Prints per turn the ids that a server computed (the prompt less what it says it had cached) and the seconds of
the request, then what each has stored at the end; draws both as SVG. Both servers run with their defaults.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import procs
from bench.models import prompt_text

SYSTEMS = ("mlx_lm.server", "penstock")
COLOURS = {"mlx_lm.server": "#b5483a", "penstock": "#20639b"}
WIDTH, HEIGHT, MARGIN = 460, 260, 46


@dataclass(frozen=True)
class Turn:
    """One request: ids of its prompt, how many were computed, and seconds until the answer was there."""

    prompt: int
    computed: int
    seconds: float


def ask(port: int, messages: list[dict[str, str]], answer: int) -> tuple[Turn, str]:
    body = {"model": "default_model", "messages": messages, "max_tokens": answer, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        found = json.load(response)
    seconds = time.perf_counter() - began
    usage = found["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    turn = Turn(usage["prompt_tokens"], usage["prompt_tokens"] - cached, seconds)
    return turn, found["choices"][0]["message"]["content"]


def play(port: int, turns: int, first: int, last: int, answer: int) -> list[Turn]:
    """The conversation: `first` ids at its first turn, `last` at its last."""
    step = (last - first) // max(1, turns - 1) - answer
    messages: list[dict[str, str]] = []
    done = []
    for number in range(turns):
        said = prompt_text(first if number == 0 else step, seed=number)
        messages.append({"role": "user", "content": said})
        turn, text = ask(port, messages, answer)
        messages.append({"role": "assistant", "content": text})
        done.append(turn)
    return done


def stored(system: str, server: procs.Server) -> float:
    """MB in the server's prompt cache, by its own words."""
    if system == "penstock":
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/status", timeout=10) as answer:
            status = json.load(answer)
        return float(_find(status, "cached")) / 1e6
    said = re.findall(r"(?:Prompt Cache|KV Caches): .*?([\d.]+) GB", server.log.read_text())
    return float(said[-1]) * 1e3 if said else 0.0


def _find(tree: Any, key: str) -> Any:
    """The first number under this name, wherever it is."""
    if isinstance(tree, dict):
        if isinstance(tree.get(key), int | float):
            return tree[key]
        tree = list(tree.values())
    found = (_find(item, key) for item in tree) if isinstance(tree, list) else iter(())
    return next((item for item in found if item is not None), None)


def measure(system: str, model: Path, log: Path, args: argparse.Namespace) -> tuple[list[Turn], float]:
    with procs.Server(system, model, log) as server:
        server.wait_ready()
        ask(server.port, [{"role": "user", "content": prompt_text(300, seed=999)}], 4)  # kernels, pages
        turns = play(server.port, args.turns, args.first, args.last, args.answer)
        time.sleep(1.5)
        return turns, stored(system, server)


def panel(title: str, series: dict[str, list[float]], left: int) -> list[str]:
    """One diagram: a line a system, from zero to the largest value."""
    top = max(max(values) for values in series.values()) or 1
    parts = [
        f'<text x="{left + MARGIN}" y="18" font-weight="bold">{title}</text>',
        f'<text x="{left + MARGIN}" y="34">up to {top:,.4g}</text>',
        f'<path d="M{left + MARGIN} 40V{HEIGHT - 24}H{left + WIDTH - 8}" fill="none" stroke="#888"/>',
    ]
    for row, (name, values) in enumerate(series.items()):
        across = (WIDTH - MARGIN - 16) / max(1, len(values) - 1)
        points = " ".join(
            f"{left + MARGIN + at * across:.1f},{HEIGHT - 24 - value / top * (HEIGHT - 66):.1f}"
            for at, value in enumerate(values)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        x = left + WIDTH - 120
        parts.append(f'<text x="{x}" y="{18 + 16 * row}" fill="{COLOURS[name]}">{name}</text>')
    return parts


def svg(found: dict[str, list[Turn]]) -> str:
    computed = {name: [float(turn.computed) for turn in turns] for name, turns in found.items()}
    seconds = {name: [turn.seconds for turn in turns] for name, turns in found.items()}
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}" font-size="12">'
    body = panel("ids computed, by turn", computed, 0) + panel("seconds, by turn", seconds, WIDTH)
    return "\n".join([head, '<g font-family="sans-serif">', *body, "</g>", "</svg>", ""])


def table(found: dict[str, list[Turn]]) -> str:
    """Markdown: a row a turn."""
    names = list(found)
    head = "| turn | prompt | " + " | ".join(f"{name}: computed | s" for name in names) + " |"
    lines = [head, "|---:" * (2 + 2 * len(names)) + "|"]
    for number, row in enumerate(zip(*found.values(), strict=True), 1):
        cells = " | ".join(f"{turn.computed} | {turn.seconds:.2f}" for turn in row)
        lines.append(f"| {number} | {row[0].prompt} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.turns", description=__doc__)
    parser.add_argument("--shape", default="hybrid", help="dense or hybrid (%(default)s)")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--first", type=int, default=500, help="ids of the first prompt (%(default)s)")
    parser.add_argument("--last", type=int, default=16_000, help="ids of the last prompt (%(default)s)")
    parser.add_argument("--answer", type=int, default=32, help="ids of an answer (%(default)s)")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=SYSTEMS)
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.svg")
    args = parser.parse_args()
    found: dict[str, list[Turn]] = {}
    kept: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        model = Path(scratch) / args.shape
        writer = [sys.executable, "-m", "bench.models", args.shape, str(model)]
        subprocess.run(writer, check=True, env=procs.environment(gpu=False))
        for system in args.systems:
            found[system], kept[system] = measure(system, model, Path(scratch) / f"{system}.log", args)
    print(table(found))
    for name, turns in found.items():
        print(f"{name}: {sum(t.computed for t in turns)} ids in {sum(t.seconds for t in turns):.1f} s, "
              f"{kept[name]:.0f} MB stored")  # fmt: skip
    if args.out:
        rows = {name: [asdict(turn) for turn in turns] for name, turns in found.items()}
        args.out.with_suffix(".json").write_text(json.dumps({"stored_mb": kept, **rows}, indent=1))
        args.out.with_suffix(".svg").write_text(svg(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
