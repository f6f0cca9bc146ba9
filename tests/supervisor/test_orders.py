"""Every order of a sequence's ends through backend, journal and ticket: one end, no id twice, none late."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from tests.support.tickets import hear, job, run

from penstock import wire
from penstock.page import Page
from penstock.supervisor import backend as backend_module
from penstock.supervisor import machine
from penstock.supervisor.backend import Backend, Tokens

READY = wire.Ready("fake", 4096, [], 100, "none", "none", "ragged", "", 0, 0, 0, {})
ENDS = ("cancel", "text stop", "eos", "length", "death")
PROMPT = 5


class FakeEngine:
    """What the backend sees of an engine, without a process."""

    def __init__(self, backend, epoch, limits):
        self.backend, self.epoch = backend, epoch
        self.code, self.closed, self.verdict = None, False, None
        self.watch = machine.Watch(limits, 0.0)
        self.process = self.channel = self
        self.page = Page.create()
        self.socket, self.pid, self.last_words, self.writable = None, 0, [], True
        self.sent = []

    def send(self, message):
        self.sent.append(message)

    def close(self):
        pass

    async def connect(self, sock):
        pass

    def says(self, message):
        self.backend._message(self, message)

    def dies(self):
        self.backend._exited(self, 1)
        self.backend._closed(self, None)


@pytest.fixture(autouse=True)
def fake_engines(monkeypatch):
    monkeypatch.setattr(backend_module, "_Engine", FakeEngine)


def ready_backend():
    backend = Backend()
    backend.start(wire.EngineOptions("fake"))
    backend._engine.says(READY)
    return backend


async def play(order, epilogue):
    """Rows come between all events, from whichever engine lives. Returns what was heard and was sent."""
    backend = ready_backend()
    opened = backend.open(job(range(PROMPT)))
    (id,) = opened.ids
    taken, ends, engines = [], [], [backend._engine]
    put_finished = opened.put_finished

    def noted(choice, reason, generated):
        ends.append(reason)
        put_finished(choice, reason, generated)

    opened.put_finished = noted

    def row():
        entry = backend.journal.get(id)
        at = len(entry.delivered) if entry is not None else 99
        engines[-1].says(wire.Step([wire.Row(id, [at])]))

    async def take():
        if isinstance(opened._events[0] if opened._events else None, Tokens):
            taken.extend((await opened.next()).ids)

    for event in (*order, *epilogue):
        row()
        await take()
        match event:
            case "cancel":
                opened.close()
            case "text stop":
                opened.end(0, PROMPT + len(taken))
            case "death":
                engines[-1].dies()
                engines[-1].says(wire.Step(rows=[wire.Row(id, [98])], ended=[wire.Ended(id, "stop", 0)]))
                engines.append(backend._engine)
                engines[-1].says(READY)
            case _:
                reason = {"eos": "stop", "length": "length"}[event]
                engines[-1].says(wire.Step(ended=[wire.Ended(id, reason, 0)]))
        row()
    heard = await hear(opened)
    assert len(backend.journal) <= (engines[-1].sent[-1:] == [wire.End(id, PROMPT + len(taken))])
    backend._watch_timer.cancel()
    for engine in engines:
        engine.page.close()
    # A cancel also drops an end that nobody has taken yet.
    assert heard.reasons == ({} if "cancel" in order else {0: ends[0]})
    return taken + heard.ids[0], ends, [engine.sent for engine in engines]


def first_end(order):
    return next(event for event in order if event != "death")


@pytest.mark.parametrize("size", range(1, len(ENDS) + 1))
def test_one_end_whatever_the_order(size):
    async def main():
        for order in itertools.permutations(ENDS, size):
            epilogue = ["eos"] if order == ("death",) else []
            ids, ends, sent = await play(order, epilogue)
            first = first_end([*order, *epilogue])
            assert ids == list(range(len(ids))), order
            assert ends == [{"eos": "stop", "length": "length"}.get(first, "cut")], order
            asked = [message for messages in sent for message in messages if isinstance(message, wire.End)]
            assert len(asked) == (first in ("cancel", "text stop")), order
            for messages in sent[1:]:
                again = [message for message in messages if isinstance(message, wire.Submit)]
                died_open = order.index("death") < order.index(first) if first in order else True
                assert len(again) == died_open, order
                assert all(len(wire.unpack_ids(submit.delivered)) > 0 for submit in again), order

    run(main())


def test_what_an_engine_computed_last_is_not_asked_for_again():
    async def main():
        backend = ready_backend()
        opened = backend.open(job(range(PROMPT), max_tokens=2))
        first = backend._engine
        first.says(wire.Step([wire.Row(opened.ids[0], [7, 8])]))
        first.dies()
        backend._engine.says(READY)
        assert not any(isinstance(message, wire.Submit) for message in backend._engine.sent)
        heard = await hear(opened)
        assert (heard.ids, heard.reasons) == ({0: [7, 8]}, {0: "length"})
        backend._watch_timer.cancel()

    run(main())


def test_an_engines_error_carries_its_kind():
    async def main():
        backend = ready_backend()
        opened = backend.open(job(range(PROMPT)))
        backend._engine.says(
            wire.Step(ended=[wire.Ended(opened.ids[0], "error", 0, "OUT_OF_MEMORY", "too much")])
        )
        with pytest.raises(backend_module.PenstockError, match="too much") as caught:
            await opened.next()
        assert caught.value.kind.label == "out_of_memory"
        backend._watch_timer.cancel()

    run(main())


def test_a_channel_that_is_full_holds_submits_back_but_not_ends():
    async def main():
        backend = ready_backend()
        engine = backend._engine
        first = backend.open(job([1]))
        engine.writable = False
        second, third = backend.open(job([2])), backend.open(job([3]))
        first.close()
        second.close()
        engine.writable = True
        backend._flush()
        kinds = [(type(message).__name__, message.id) for message in engine.sent[1:]]
        assert kinds == [("Submit", first.ids[0]), ("End", first.ids[0]), ("Submit", third.ids[0])]
        backend._watch_timer.cancel()
        await asyncio.sleep(0)

    run(main())
