"""The real engine, which writes down what arrives and what it launches. Production code has no hook.

Lines of JSON in the file that PENSTOCK_TEST_TRACE names: `submit` (id, ids), `chunk` (id, start, length, ids
that the stall target allows, streams that run), `token` (id). With PENSTOCK_TEST_TOGETHER=N the engine takes
no third chunk of its first prompt before N sequences have arrived: who comes then comes while it prefills,
on any machine. Run as a module with `serve` this file is the server with that engine.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from penstock import wire

SERVE = (sys.executable, "-m", "tests.support.traced_engine")
FIRST_CHUNKS = 2


def traced(loop: Any) -> None:
    """Let a loop write down what it does."""
    file = Path(os.environ["PENSTOCK_TEST_TRACE"]).open("a", buffering=1)  # noqa: SIM115 - as long as the process
    together = int(os.environ.get("PENSTOCK_TEST_TOGETHER", "0"))
    receive, send, launch, take = loop.channel.receive, loop.channel.send, loop._launch_chunk, loop._take
    seen = {"submits": 0, "chunks": 0}

    def write(event: str, **fields: Any) -> None:
        file.write(json.dumps({"event": event, **fields}) + "\n")

    def receiving(timeout: float | None = 0.0) -> list[wire.ToEngine]:
        messages = receive(timeout)
        arrived = sum(isinstance(m, wire.Submit) for m in messages)
        while seen["chunks"] >= FIRST_CHUNKS and seen["submits"] + arrived < together:
            messages += (more := receive(None))
            arrived += sum(isinstance(m, wire.Submit) for m in more)
        return messages

    def taking(message: wire.ToEngine) -> None:
        if isinstance(message, wire.Submit):
            seen["submits"] += 1
            write("submit", id=message.id, ids=len(message.prompt) // 4)
        take(message)

    def launching(chunk: Any) -> Any:
        seen["chunks"] += 1
        per_id = loop.facts.seconds_per_prefill_id
        streams = sum(s.decodable for s in loop.sequences.values() if s.row is not None)
        write(
            "chunk",
            id=chunk.sequence.id,
            start=chunk.sequence.launched,
            length=chunk.length,
            allowed=loop.facts.stall_target / per_id if per_id else None,
            streams=streams,
        )
        return launch(chunk)

    def sending(message: wire.ToFront) -> None:
        if isinstance(message, wire.Step):
            for row in message.rows:
                write("token", id=row.id)
        send(message)

    loop.channel.receive, loop.channel.send = receiving, sending
    loop._launch_chunk, loop._take = launching, taking


def engine() -> int:
    from penstock.engine import loop, main

    made = loop.Loop.__init__

    def init(self: loop.Loop, *rest: Any, **named: Any) -> None:
        made(self, *rest, **named)
        traced(self)

    loop.Loop.__init__ = init  # type: ignore[method-assign]
    return main.main()


def serve() -> int:
    from penstock import cli
    from penstock.supervisor import backend

    backend.Backend.__init__.__defaults__ = ((sys.executable, str(Path(__file__).resolve())),)
    return int(cli.main(sys.argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:2] == ["serve"] else engine())
