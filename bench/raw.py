"""The raw model loops without HTTP: what a server could reach at most. A process of its own per round.

`mlx_lm`: the installed mlx-lm's BatchGenerator. `penstock`: our own rows, prefilled one by one and decoded
together, one step in flight. stdin: {"loop", "model", "prompts": [ids], "max_tokens": [n]}; stdout: arrivals
per row as the load generator gives them, the allocator's peak, and what it held after each step beyond what
was there before: with no server around it, that is K/V and states.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

CHUNK = 2048
"""Ids of a prefill chunk, both loops': mlx-lm's default."""


def run_mlx_lm(model_dir: Path, prompts: list[list[int]], max_tokens: list[int]) -> list[list[float]]:
    """mlx-lm's dense batch, with its server's default sizes; rows of one length are prefilled together, each
    such group before the next, because a padded prefill of unequal rows takes several times as long."""
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator

    model, _ = load(str(model_dir))
    generator = BatchGenerator(model)

    def batch(some: list[list[int]], limits: list[int]) -> list[list[float]]:
        arrivals: dict[int, list[float]] = {}
        open_rows: set[int] = set()

        def step() -> None:
            for response in generator.next()[1]:
                arrivals[response.uid].append(time.monotonic())
                if response.finish_reason is not None:
                    open_rows.discard(response.uid)
            _note()

        for _, group in groupby(zip(some, limits, strict=True), key=lambda row: len(row[0])):
            joining = generator.insert(*map(list, zip(*group, strict=True)))
            arrivals |= {uid: [] for uid in joining}
            open_rows |= set(joining)
            while not all(arrivals[uid] for uid in joining):
                step()
        while open_rows:
            step()
        return list(arrivals.values())

    batch([prompt[:32] for prompt in prompts], [4] * len(prompts))
    _start()
    return batch(prompts, max_tokens)


def run_penstock(model_dir: Path, prompts: list[list[int]], max_tokens: list[int]) -> list[list[float]]:
    """Our rows without scheduler, front or sockets: greedy, all rows admitted at once."""
    import mlx.core as mx

    from penstock.engine.batch import Runner
    from penstock.engine.loader import load

    runner = Runner(load(model_dir).model)

    def batch(some: list[list[int]], limits: list[int]) -> list[list[float]]:
        rows = [runner.open(len(ids) + n) for ids, n in zip(some, limits, strict=True)]
        for row, ids in zip(rows, some, strict=True):
            for at in range(0, len(ids) - 1, CHUNK):
                mx.eval(runner.prefill(row, ids[at : min(at + CHUNK, len(ids) - 1)]))
        arrivals: list[list[float]] = [[] for _ in rows]
        live = list(range(len(rows)))
        ids = mx.argmax(runner.decode(rows, mx.array([p[-1] for p in some])), axis=-1)
        mx.async_eval(ids)
        while live:
            following = mx.argmax(runner.decode([rows[i] for i in live], ids), axis=-1)
            mx.async_eval(following)
            ids.tolist()
            now = time.monotonic()
            for i in live:
                arrivals[i].append(now)
            _note()
            stay = [k for k, i in enumerate(live) if len(arrivals[i]) < limits[i]]
            ids = following if len(stay) == len(live) else following[mx.array(stay, dtype=mx.int32)]
            for i in set(live) - {live[k] for k in stay}:
                runner.close(rows[i])
            live = [live[k] for k in stay]
        return arrivals

    batch([prompt[:32] for prompt in prompts], [4] * len(prompts))
    _start()
    return batch(prompts, max_tokens)


_started = 0.0
_before = 0
_held: list[tuple[float, int]] = []


def _note() -> None:
    import mlx.core as mx

    _held.append((time.monotonic(), mx.get_active_memory() - _before))


def _start() -> None:
    """The measured part begins: what the warm-up left is forgotten."""
    import mlx.core as mx

    global _started, _before  # noqa: PLW0603
    gc.collect()
    mx.clear_cache()
    _before = mx.get_active_memory()
    _held.clear()
    mx.reset_peak_memory()
    _started = time.monotonic()


def main() -> None:
    spec: dict[str, Any] = json.load(sys.stdin)
    import mlx.core as mx

    loop = {"mlx_lm": run_mlx_lm, "penstock": run_penstock}[spec["loop"]]
    arrivals = loop(Path(spec["model"]), spec["prompts"], spec["max_tokens"])
    answer = {"sent": _started, "arrivals": arrivals, "peak": mx.get_peak_memory(), "held": _held}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
