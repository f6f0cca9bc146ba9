"""An engine without a model: it speaks the wire protocol and plays ids from a script.

Started like the real engine (`COMMAND`), told what to do by the environment variable PENSTOCK_SCRIPT, which
holds JSON or the path of a JSON file. Which id stands at which position depends on the prompt alone, so a
continuation after a death is exact, and `delivered` is checked against the script.

    {
      "ready": {"context_length": 4096, ...},        overrides of the facts in Ready
      "load_seconds": 0.0, "halt": "reason",         the start: how long; Halt instead of Ready
      "answers": [{"contains": [7, 8], "ids": [...], "reason": "stop"}, ...],   first match wins
      "echo": true,                                  no match: the prompt's own ids (false: nothing)
      "token_seconds": 0.0, "tokens_per_step": 1,
      "prefill_chunk": 512, "prefill_seconds": 0.0,  per chunk
      "print": "text",                               to stderr, at the start
      "idle_beat": 1.0,                              seconds between signs of life without work
      "exit_grace": 5.0,                             how long a hung engine outlives its front
      "faults": [{"epoch": 1, "at": "step", "n": 3, "do": "SIGKILL"}, ...]
    }

A fault's `at`: load (once, while loading), message (the n-th message read after Start), step (before the n-th
step's results are sent), sent (after they are), prefill or decode (a row whose prompt contains `contains` is
about to run). `do`: a signal's name, "exit:3", "hang", "halt:reason" or "raise". Without `epoch`: in every
engine. `hang` makes no progress any more; SIGSTOP stops the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from penstock import wire
from penstock.page import Page, Phase
from penstock.pipe import EXIT_GRACE, EngineChannel, FrontGone, adopt

COMMAND = (sys.executable, str(Path(__file__).resolve()))
BACKLOG_BOUND = 1 << 20


def environment(script: dict[str, Any]) -> dict[str, str]:
    """The environment for a Backend or a server whose engine plays `script`."""
    return {**os.environ, "PENSTOCK_SCRIPT": json.dumps(script)}


def contains(ids: array[int], part: list[int]) -> bool:
    width = len(part)
    return any(list(ids[at : at + width]) == part for at in range(len(ids) - width + 1))


class Sequence:
    def __init__(self, submit: wire.Submit, script: dict[str, Any]) -> None:
        self.id = submit.id
        self.submit = submit
        self.prompt = wire.unpack_ids(submit.prompt)
        delivered = wire.unpack_ids(submit.delivered)
        self.at = len(delivered)
        self.prefilled = 0
        self.ids, self.reason = self._answer(script)
        if submit.max_tokens is not None and submit.max_tokens < len(self.ids):
            self.ids, self.reason = self.ids[: submit.max_tokens], "length"
        self.apart = submit.apart
        self.wrong = list(delivered) != self.ids[: self.at]

    def _answer(self, script: dict[str, Any]) -> tuple[list[int], str]:
        for answer in script.get("answers", []):
            if contains(self.prompt, answer.get("contains", [])):
                return list(answer["ids"]), answer.get("reason", "stop")
        return (list(self.prompt) if script.get("echo", True) else []), "stop"

    @property
    def total(self) -> int:
        return len(self.prompt) + self.at

    def take(self, count: int) -> wire.Row:
        ids = self.ids[self.at : self.at + count]
        self.at += len(ids)
        wanted = self.submit.sampling.logprobs
        if wanted is None:
            return wire.Row(self.id, ids)
        top = [[(id + rank, -0.5 - rank) for rank in range(wanted)] for id in ids]
        return wire.Row(self.id, ids, [-0.5] * len(ids), top)


class Engine:
    def __init__(self, channel: EngineChannel, page: Page, script: dict[str, Any]) -> None:
        self.channel = channel
        self.page = page
        self.script = script
        self.epoch = int(os.environ.get("PENSTOCK_ENGINE_EPOCH", "1"))
        self.sequences: dict[int, Sequence] = {}
        self.ended: list[wire.Ended] = []
        self.messages = 0
        self.steps = 0

    def fault(self, at: str, n: int = 1, prompt: array[int] | None = None) -> None:
        for fault in self.script.get("faults", []):
            if fault["at"] != at or fault.get("epoch", self.epoch) != self.epoch:
                continue
            if fault.get("n", n) == n and (prompt is None or contains(prompt, fault.get("contains", []))):
                self.do(fault["do"])

    def do(self, what: str) -> None:
        kind, _, detail = what.partition(":")
        if kind == "exit":
            self.channel.flush(1.0)
            os._exit(int(detail))
        if kind == "halt":
            self.channel.send(wire.Halt(detail))
            self.channel.flush(1.0)
            os._exit(1)
        if kind == "raise":
            raise RuntimeError("a scripted failure")
        if kind == "hang":
            time.sleep(3600)
        self.channel.flush(1.0)
        os.kill(os.getpid(), getattr(signal, kind))

    def load(self) -> None:
        self.channel.send(wire.Loading("weights"))
        if "print" in self.script:
            print(self.script["print"], file=sys.stderr, flush=True)
        deadline = time.monotonic() + self.script.get("load_seconds", 0.0)
        self.fault("load")
        while time.monotonic() < deadline:
            self.page.beat()
            time.sleep(0.01)
        if "halt" in self.script:
            self.do(f"halt:{self.script['halt']}")
        facts: dict[str, Any] = {
            "model_type": "scripted",
            "context_length": 131072,
            "eos_ids": [],
            "vocab_size": 1 << 20,
            "backend": "none",
            "device": "script",
            "batch_mode": "ragged",
            "batch_reason": "scripted",
            "weights_bytes": 0,
            "kv_bytes_per_token": 0,
            "state_bytes": 0,
            "versions": {},
        }
        self.page.begin(Phase.IDLE)
        self.channel.send(wire.Ready(**{**facts, **self.script.get("ready", {})}))

    def run(self) -> None:
        start = self.channel.receive(None)
        assert isinstance(start[0], wire.Start)
        self.load()
        waiting = start[1:]
        while True:
            for message in waiting:
                self.messages += 1
                self.fault("message", self.messages)
                if isinstance(message, wire.Shutdown):
                    self.channel.flush(1.0)
                    return
                self.take(message)
            idle = not self.sequences and not self.ended
            if idle:
                self.page.begin(Phase.IDLE)
            elif self.channel.backlog < BACKLOG_BOUND:
                self.step()
            self.page.beat()
            waiting = self.channel.receive(self.script.get("idle_beat", 1.0) if idle else 0.0)

    def take(self, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Submit):
            sequence = Sequence(message, self.script)
            if sequence.wrong:
                self.ended.append(wire.Ended(message.id, "error", 0, "INTERNAL", "delivered ids are wrong"))
            else:
                self.sequences[message.id] = sequence
        elif isinstance(message, wire.End) and self.sequences.pop(message.id, None) is not None:
            self.ended.append(wire.Ended(message.id, "cut", message.keep))
        elif isinstance(message, wire.Release):
            print(f"released {message.cache}", file=sys.stderr, flush=True)

    def step(self) -> None:
        self.steps += 1
        prefill = self.prefill()
        rows = self.decode()
        self.page.step_done()
        self.fault("step", self.steps)
        ended, self.ended = self.ended, []
        self.channel.send(wire.Step(rows=rows, prefill=prefill, ended=ended))
        self.fault("sent", self.steps)

    def prefill(self) -> list[wire.Prefill]:
        left = [s for s in self.sequences.values() if s.prefilled < s.total]
        if not left:
            return []
        sequence = min(left, key=lambda s: (s.total - s.prefilled, s.submit.arrival))
        seconds = self.script.get("prefill_seconds", 0.0)
        end = min(sequence.total, sequence.prefilled + self.script.get("prefill_chunk", 512))
        self.page.begin(Phase.PREFILL, [(sequence.id, sequence.prefilled, end)], seconds)
        self.fault("prefill", prompt=sequence.prompt)
        time.sleep(seconds)
        sequence.prefilled = end
        return [wire.Prefill(sequence.id, sequence.prefilled, sequence.total)]

    def decode(self) -> list[wire.Row]:
        ready = [s for s in self.sequences.values() if s.prefilled >= s.total]
        apart = [s for s in ready if s.total <= s.apart]
        if apart:
            # Suspects one at a time, the others in between.
            ready = [s for s in ready if s not in apart] if self.steps % 2 else []
            ready = ready or apart[:1]
        if not ready:
            return []
        seconds = self.script.get("token_seconds", 0.0)
        self.page.begin(Phase.DECODE, [(s.id, s.total - 1, s.total) for s in ready], seconds)
        for sequence in ready:
            self.fault("decode", prompt=sequence.prompt)
        time.sleep(seconds)
        rows = []
        for sequence in ready:
            if sequence.at < len(sequence.ids):
                rows.append(sequence.take(self.script.get("tokens_per_step", 1)))
                sequence.prefilled = sequence.total
            if sequence.at >= len(sequence.ids):
                self.ended.append(wire.Ended(sequence.id, sequence.reason, sequence.total))
                del self.sequences[sequence.id]
        return rows


def main() -> None:
    source = os.environ.get("PENSTOCK_SCRIPT", "{}")
    script = json.loads(source if source.lstrip().startswith("{") else Path(source).read_text())
    channel, page = adopt(sys.argv[1:], script.get("exit_grace", EXIT_GRACE))
    with contextlib.suppress(FrontGone):
        Engine(channel, page, script).run()


if __name__ == "__main__":
    main()
