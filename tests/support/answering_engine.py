"""An engine that computes nothing: it answers a prompt by the first rule whose words the prompt holds.

Runs where the real engine would, on the real socketpair and page, and speaks the real wire. The rules are
read anew from a file at every submission, so that a test can set them while the server runs; what happens
(submitted, prefilled, joined, ended) goes to a journal, one JSON object a line. Started by `serve_scripted`.

A rule: {"when": "words" | "", "pieces": ["each", "tokenised", "apart"], "queued": seconds without a sign of
progress, then "prefill": seconds, then "step": seconds a token, "reason": "stop" | "length" | "error",
"die": true (SIGKILL instead of the first token)}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from penstock import wire
from penstock.page import Page, Phase
from penstock.pipe import EngineChannel, FrontGone, adopt

DEFAULT = {"when": "", "pieces": ["fine"]}
ERROR = ("OUT_OF_MEMORY", "The device ran out of memory.")
PREFILL_PART = 0.25
"""Seconds between two signs of progress of a scripted prefill."""


@dataclass
class Row:
    """A sequence in play: when its next event is due, and what is left of it."""

    submit: wire.Submit
    rule: dict[str, Any]
    prompt: int
    ids: list[int]
    due: float
    prefill_end: float
    prefill_seconds: float
    sent: int = 0
    joined: bool = False


class Engine:
    """The loop. One message per turn carries all rows that are due, as the real one's does."""

    def __init__(self, channel: EngineChannel, page: Page) -> None:
        self.channel, self.page = channel, page
        self.rules = Path(os.environ["SCRIPTED_RULES"])
        self.journal = Path(os.environ["SCRIPTED_JOURNAL"])
        self.rows: dict[int, Row] = {}

    def note(self, event: str, id: int, **more: Any) -> None:
        line = json.dumps({"event": event, "id": id, "t": time.monotonic(), **more})
        with self.journal.open("a") as journal:
            journal.write(line + "\n")

    def run(self) -> int:
        """Until the front says so or is gone."""
        while True:
            now = time.monotonic()
            wait = max(min((row.due for row in self.rows.values()), default=now + 0.5) - now, 0.0)
            try:
                messages = self.channel.receive(min(wait, 0.5) or 0.0)
            except FrontGone:
                return 0
            for message in messages:
                if isinstance(message, wire.Start):
                    self.start(message)
                elif isinstance(message, wire.Submit):
                    self.submit(message)
                elif isinstance(message, wire.End):
                    self.end(message)
                elif isinstance(message, wire.Shutdown):
                    return 0
            self.step()

    def start(self, message: wire.Start) -> None:
        model = Path(message.options.model_path)
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        config = json.loads((model / "config.json").read_text())
        self.eos, self.context = config["eos_token_id"], config["max_position_embeddings"]
        self.channel.send(
            wire.Ready(
                model_type="scripted",
                context_length=self.context,
                eos_ids=[self.eos],
                vocab_size=config["vocab_size"],
                backend="none",
                device="none",
                batch_mode="ragged",
                batch_reason="scripted",
                weights_bytes=0,
                kv_bytes_per_token=1,
                state_bytes=0,
                versions={},
            )
        )

    def submit(self, message: wire.Submit) -> None:
        ids = wire.unpack_ids(message.prompt)
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        rules = [*json.loads(self.rules.read_text()), DEFAULT]
        rule = next(rule for rule in rules if rule["when"] in text)
        answer = [id for p in rule["pieces"] for id in self.tokenizer.encode(p, add_special_tokens=False).ids]
        if rule.get("reason", "stop") == "stop":
            answer.append(self.eos)
        now, seconds = time.monotonic(), float(rule.get("prefill", 0.0))
        sent = len(wire.unpack_ids(message.delivered))
        begin = now + float(rule.get("queued", 0.0))
        first = begin + min(PREFILL_PART, seconds)
        self.rows[message.id] = Row(message, rule, len(ids), answer, first, begin + seconds, seconds, sent)
        self.note("submit", message.id, prompt=len(ids), rule=rule["when"], choice=message.sampling.choice)
        if begin == now:
            self.channel.send(wire.Step(started=[wire.Started(message.id, 0, "diverged at token 0")]))

    def end(self, message: wire.End) -> None:
        row = self.rows.pop(message.id, None)
        self.note("end", message.id, known=row is not None, keep=message.keep)
        if row is not None:
            done = wire.Ended(message.id, "cut", min(message.keep, row.prompt + row.sent))
            self.channel.send(wire.Step(ended=[done]))

    def step(self) -> None:
        now = time.monotonic()
        due = {id: row for id, row in self.rows.items() if row.due <= now}
        prefilling = any(row.prefill_end > now for row in due.values())
        self.page.begin(
            (Phase.PREFILL if prefilling else Phase.DECODE) if self.rows else Phase.IDLE,
            [(id, row.prompt + row.sent - 1, row.prompt + row.sent) for id, row in due.items()],
        )
        rows, prefill, ended = [], [], []
        for id, row in due.items():
            if row.prefill_end > now:
                left = (row.prefill_end - now) / row.prefill_seconds
                prefill.append(wire.Prefill(id, int(row.prompt * (1 - left)), row.prompt))
                row.due = min(now + PREFILL_PART, row.prefill_end)
                continue
            if not row.joined:
                row.joined = True
                self.note("joined", id)
                if row.rule.get("die"):
                    self.note("died", id)
                    os.kill(os.getpid(), signal.SIGKILL)
            token, reason = self.next_token(row)
            if token is not None:
                rows.append(self.row(id, row, token))
                row.sent += 1
                row.due = now + float(row.rule.get("step", 0.0))
            if reason is not None:
                error = ERROR if reason == "error" else (None, None)
                ended.append(wire.Ended(id, reason, row.prompt + row.sent, *error))
                del self.rows[id]
                self.note("finished", id, reason=reason, sent=row.sent)
        if rows or prefill or ended:
            self.channel.send(wire.Step(rows=rows, prefill=prefill, ended=ended))
            self.page.step_done()
        self.page.beat()

    def next_token(self, row: Row) -> tuple[int | None, str | None]:
        """The next id (None when only the end is left) and, with the last one, the reason."""
        limit = min(row.submit.max_tokens or len(row.ids), self.context - row.prompt)
        own = row.rule.get("reason", "stop")
        if row.sent >= len(row.ids):
            return None, own
        token = row.ids[row.sent]
        if row.sent + 1 == len(row.ids):
            return token, own if own != "length" else "length"
        return token, "length" if row.sent + 1 >= limit else None

    def row(self, id: int, row: Row, token: int) -> wire.Row:
        wanted = row.submit.sampling.logprobs
        if wanted is None:
            return wire.Row(id, [token])
        others = [(other, -2.0 - rank) for rank, other in enumerate(range(40, 40 + wanted))]
        top = [[(token, -0.25), *others][:wanted]]
        return wire.Row(id, [token], [-0.25], top if wanted else None)


if __name__ == "__main__":
    sys.exit(Engine(*adopt(sys.argv[1:])).run())
