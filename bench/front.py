"""The front's CPU time per token and stream: the whole program with a scripted engine, so that nothing else
takes part, and beside it the floor: a bare asyncio server that writes the same number of such chunks.

`python -m bench.front [--streams 8] [--tokens 1000] [--step 0.02] [--rounds 3]`. Read from the system (all
threads of the process) while every stream flows; the load generator is a process of its own. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.client_model import write_client_model
from tests.support.serve_scripted import ScriptedServer

from bench import procs, report

REQUEST = {
    "path": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "go"}], "stream": True},
}
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"model","system_fingerprint":null,"choices":[{"index":0,"delta":{"content":" ab"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)


def measure(port: int, pid: int, streams: int) -> float:
    """Microseconds of a process's CPU time per token, while it serves `streams` streams at `port`."""
    samples: list[tuple[float, float]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.1):
            samples.append((time.monotonic(), procs.cpu_seconds(pid)))

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        answers = procs.send_load(port, [REQUEST] * streams)
    finally:
        over.set()
        watcher.join()
    rows = [answer["arrivals"] for answer in answers]
    start, end = report.steady_window(rows)
    (first, before), *_, (last, after) = [(at, cpu) for at, cpu in samples if start <= at <= end]
    tokens = sum(first < at <= last for row in rows for at in row)
    return 1e6 * (after - before) / tokens


@contextlib.contextmanager
def floor_server(tokens: int, step: float) -> Iterator[tuple[int, int]]:
    """Port and pid of the bare server."""
    port = procs.free_port()
    command = [sys.executable, "-m", "bench.front", "--floor", str(port)]
    with subprocess.Popen([*command, "--tokens", str(tokens), "--step", str(step)]) as process:
        try:
            time.sleep(1.5)
            yield port, process.pid
        finally:
            process.kill()


async def floor(port: int, tokens: int, step: float) -> None:
    """Writes one event to every open stream each step, and nothing else."""
    writers: dict[asyncio.StreamWriter, int] = {}

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        writers[writer] = tokens

    await asyncio.start_server(take, "127.0.0.1", port)
    chunk = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
    end = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    while True:
        await asyncio.sleep(step)
        for writer in list(writers):
            writer.write(chunk)
            writers[writer] -= 1
            if not writers[writer]:
                del writers[writer]
                writer.write(end)
                writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--step", type=float, default=0.02, help="seconds of the engine's step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--floor", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.floor:
        asyncio.run(floor(args.floor, args.tokens, args.step))
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = write_client_model(Path(scratch) / "model")
        for _ in range(args.rounds):
            with ScriptedServer(model, Path(scratch), "--log-level", "WARNING") as server:
                rule = {"when": "", "pieces": [" ab"] * args.tokens, "step": args.step, "reason": "length"}
                server.rules(rule)
                ours.append(measure(server.port, server.process.pid, args.streams))
            with floor_server(args.tokens, args.step) as (port, pid):
                bare.append(measure(port, pid, args.streams))
    print(f"{args.streams} streams, a token each every {1e3 * args.step:.0f} ms, µs of CPU time per token:")
    print(f"  the front             {report.Spread.of(ours)}")
    print(f"  bare asyncio writes   {report.Spread.of(bare)}")


if __name__ == "__main__":
    main()
