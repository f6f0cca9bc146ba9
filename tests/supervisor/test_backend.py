"""The backend with real engine processes that play a script: starts, ends, deaths, hangs, stops."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

import pytest
from tests.support import scripted_engine
from tests.support.serving_backend import OPTIONS, die, play, until
from tests.support.tickets import hear, job, run

from penstock.errors import Kind, PenstockError
from penstock.supervisor.backend import Backend, Done, Finished
from penstock.supervisor.channel import FrontChannel
from penstock.supervisor.machine import HangLimits, Policy
from penstock.supervisor.queue import QueueLimits


def test_jobs_opened_before_it_is_ready_are_served():
    async def main(backend):
        assert backend.state == "loading"
        opened = backend.open(job([5, 6, 7]))
        ready = await backend.wait_ready()
        assert ready.model_type == "scripted"
        assert backend.state == "ready"
        heard = await hear(opened)
        assert heard.ids == {0: [5, 6, 7]}
        assert heard.reasons == {0: "stop"}
        assert heard.progress == [(3, 3)]

    play(main)


def test_before_its_start_it_is_downloading():
    backend = Backend()
    assert (backend.state, backend.snapshot()["engine"]) == ("downloading", None)


def test_a_start_after_the_stop_is_void():
    async def main():
        backend = Backend(["/nonexistent/engine"])
        await backend.stop(0.0)
        backend.start(OPTIONS)
        assert (backend.state, backend.snapshot()["engine_deaths"]) == ("stopping", 0)

    run(main())


def test_choices_and_logprobs_and_length():
    async def main(backend):
        heard = await hear(backend.open(job([1, 2, 3, 4], n=3, max_tokens=2, sampling={"logprobs": 1})))
        assert heard.ids == {0: [1, 2], 1: [1, 2], 2: [1, 2]}
        assert heard.reasons == {0: "length", 1: "length", 2: "length"}

    play(main)


def test_seeds_are_drawn_unless_given_and_each_choice_has_its_number():
    async def main(backend):
        samplings = []
        for fields in ({}, {}, {"seed": 0}, {"sampling": {"seed": 9}}):
            opened = backend.open(job([1], n=2, **fields))
            samplings += [[backend.journal.get(id).sampling for id in opened.ids]]
            opened.close()
        assert all([s.choice for s in pair] == [0, 1] for pair in samplings)
        assert all(pair[0].seed == pair[1].seed for pair in samplings)
        drawn, again, zero, nine = (pair[0].seed for pair in samplings)
        assert drawn != again
        assert (zero, nine) == (0, 9)

    play(main)


def test_a_cut_is_answered_at_once_and_leaves_the_engine():
    async def main(backend):
        opened = backend.open(job(range(1000)))
        other = backend.open(job(range(50)))
        heard = []
        while len(heard) < 3:
            event = await opened.next()
            heard += getattr(event, "ids", [])
        opened.end(0, 1002)
        assert await opened.next() == Finished(0, "cut")
        with pytest.raises(Done):
            await opened.next()
        assert opened.stats.generated == [2]
        opened.end(0, 5)
        opened.close()
        await until(lambda: backend.snapshot()["ending"] == 0)
        assert (await hear(other)).ids == {0: list(range(50))}

    play(main, {"token_seconds": 0.002})


def test_a_job_closed_while_it_waits_never_reaches_an_engine():
    async def main(backend):
        opened = backend.open(job(range(10)))
        opened.close()
        assert backend.snapshot()["open"] == 0
        assert backend.snapshot()["ending"] == 0
        assert (await hear(backend.open(job([1])))).ids == {0: [1]}

    # The first message after Start would be the closed job's.
    play(main, {"answers": [{"contains": [9], "ids": [666]}]})


def test_many_long_prompts_are_held_back_without_loss(monkeypatch):
    held_back = []
    resume = FrontChannel.resume_writing
    monkeypatch.setattr("penstock.supervisor.channel.OUTGOING_BOUND", 1 << 16)
    monkeypatch.setattr("penstock.supervisor.process._SOCKET_BUFFER", 1 << 13)  # takes no prompt at once
    monkeypatch.setattr(FrontChannel, "resume_writing", lambda self: held_back.append(1) or resume(self))

    async def main(backend):
        prompt = [1, 2, 3] + [7] * 60_000
        tickets = [backend.open(job(prompt, max_tokens=3)) for _ in range(40)]
        await backend.wait_ready()
        for ticket in tickets:
            assert (await hear(ticket)).ids == {0: [1, 2, 3]}
        assert held_back

    play(main, {"prefill_chunk": 1 << 20})


@pytest.mark.parametrize(
    ("at", "n", "do"),
    [
        ("message", 1, "SIGKILL"),
        ("message", 3, "SIGSEGV"),
        ("prefill", 1, "SIGKILL"),
        ("step", 1, "SIGABRT"),
        ("step", 4, "exit:0"),
        ("sent", 5, "SIGKILL"),
        ("sent", 20, "raise"),
    ],
)
def test_open_streams_go_on_after_a_death(at, n, do):
    async def main(backend):
        prompts = [list(range(base, base + 30)) for base in (100, 200, 300)]
        tickets = [backend.open(job(prompt, n=2)) for prompt in prompts]
        for prompt, ticket in zip(prompts, tickets, strict=True):
            heard = await hear(ticket)
            assert heard.ids == {0: prompt, 1: prompt}
            assert heard.reasons == {0: "stop", 1: "stop"}
            assert ticket.stats.restarts == 1
        assert backend.snapshot()["engine_deaths"] == 1

    play(main, die(at, n, do) | {"prefill_chunk": 16})


def test_a_sequence_cut_before_the_death_is_not_submitted_again():
    async def main(backend):
        opened = backend.open(job([666]))
        other = backend.open(job(range(40)))
        while not opened.stats.generated[0]:
            await opened.next()
        os.kill(backend.snapshot()["engine"]["pid"], signal.SIGSTOP)
        opened.end(0, 2)
        assert backend.snapshot()["ending"] == 1
        os.kill(backend.snapshot()["engine"]["pid"], signal.SIGKILL)
        assert (await hear(other)).ids == {0: list(range(40))}
        assert backend.snapshot()["ending"] == 0

    # It would last for a minute: a test that is held up must not find it over already.
    long = {"contains": [666], "ids": list(range(6000))}
    play(main, {"answers": [long], "token_seconds": 0.01})


def test_while_restarting_the_state_says_so_and_new_jobs_wait():
    async def main(backend):
        await backend.wait_ready()
        os.kill(backend.snapshot()["engine"]["pid"], signal.SIGKILL)
        await until(lambda: backend.state != "ready")
        assert backend.state == "restarting"
        assert "SIGKILL" in backend.reason
        assert (await hear(backend.open(job([4, 5])))).ids == {0: [4, 5]}
        assert (backend.state, backend.reason) == ("ready", None)

    play(main)


def test_three_deaths_while_loading_halt_with_the_reason():
    async def main(backend):
        opened = backend.open(job([1]))
        with pytest.raises(PenstockError, match=r"3 times in a row while loading.*code 7") as caught:
            await backend.wait_ready()
        assert caught.value.kind is Kind.ENGINE_HALTED
        with pytest.raises(PenstockError):
            await hear(opened)
        with pytest.raises(PenstockError):
            backend.open(job([1]))
        assert backend.state == "halted"
        assert backend.snapshot()["engine_deaths"] == 3

    play(main, {"faults": [{"at": "load", "do": "exit:7"}]})


def test_two_deaths_while_loading_are_got_over():
    async def main(backend):
        assert (await hear(backend.open(job([1, 2])))).ids == {0: [1, 2]}
        assert backend.snapshot()["engine_deaths"] == 2

    play(main, {"faults": [{"epoch": epoch, "at": "load", "do": "SIGKILL"} for epoch in (1, 2)]})


def test_a_reload_that_fails_again_and_again_is_got_over():
    async def main(backend):
        await backend.wait_ready()
        waiting = backend.open(job([1] * 50))
        with pytest.raises(PenstockError, match="3 times in a row while loading") as caught:
            await hear(waiting)
        assert caught.value.kind is Kind.ENGINE_DIED
        await until(lambda: backend.state == "ready")
        assert (await hear(backend.open(job([4, 5])))).ids == {0: [4, 5]}
        assert backend.snapshot()["engine_deaths"] == 6

    faults = [{"epoch": epoch, "at": "load", "do": "exit:7"} for epoch in range(2, 7)]
    play(
        main,
        {"token_seconds": 0.01, "faults": [{"epoch": 1, "at": "step", "n": 3, "do": "SIGKILL"}, *faults]},
    )


def test_a_halt_is_not_tried_again():
    async def main(backend):
        with pytest.raises(PenstockError, match="no such architecture"):
            await backend.wait_ready()
        assert (backend.state, backend.reason) == ("halted", "no such architecture")
        await until(lambda: backend.snapshot()["engine"] is None)
        assert backend.snapshot()["engine_deaths"] == 0

    play(main, {"halt": "no such architecture"})


def test_a_model_that_cannot_be_loaded_again_for_a_while_is_served_after_it():
    async def main(backend):
        assert (await hear(backend.open(job(range(20))))).ids == {0: list(range(20))}
        assert backend.snapshot()["engine_deaths"] == 3

    gone = [{"epoch": epoch, "at": "load", "do": "halt:it has no config.json"} for epoch in (2, 3)]
    faults = [{"epoch": 1, "at": "step", "n": 3, "do": "SIGKILL"}, *gone]
    play(main, {"token_seconds": 0.01, "faults": faults})


def test_who_waits_too_long_is_told_so_where_no_engine_is_there():
    async def main(backend):
        await backend.wait_ready()
        os.kill(backend.snapshot()["engine"]["pid"], signal.SIGKILL)
        await until(lambda: backend.snapshot()["engine"] is None)
        with pytest.raises(PenstockError, match="busy, retry"):
            await hear(backend.open(job([1])))

    faults = [{"epoch": epoch, "at": "load", "do": "exit:7"} for epoch in range(2, 9)]
    play(
        main,
        {"faults": faults},
        policy=Policy(loading_deaths=9, backoff=0.3),
        limits=HangLimits(interval=0.05),
        queue=QueueLimits(seconds=0.5),
    )


def test_a_command_that_cannot_be_started_halts():
    async def main(backend):
        with pytest.raises(PenstockError, match="could not be started"):
            await backend.wait_ready()

    play(main, command=["/nonexistent/engine"])


def test_bytes_that_are_no_message_are_a_death():
    async def main(backend):
        with pytest.raises(PenstockError, match="no message"):
            await backend.wait_ready()

    babble = "import os, sys, time; os.write(int(sys.argv[2]), b'\\x03\\0\\0\\0abc'); time.sleep(600)"
    limits = HangLimits(kill_grace=0.1)
    play(main, command=[sys.executable, "-c", babble], limits=limits, policy=Policy(loading_deaths=1))


QUICK = HangLimits(floor=0.4, slack=10.0, loading=20.0, interval=0.1, kill_grace=2.0)


@pytest.mark.parametrize("how", ["hang", "SIGSTOP"])
def test_a_hung_engine_is_replaced_and_streams_go_on(how, caplog):
    async def main(backend):
        assert (await hear(backend.open(job(range(20))))).ids == {0: list(range(20))}
        assert backend.snapshot()["engine_deaths"] == 1

    play(main, die("sent", 8, how), limits=QUICK)
    assert "no progress" in caplog.text
    assert "SIGABRT" in caplog.text
    assert "scripted_engine.py" in caplog.text, "the stacks are in the log"


def test_a_hung_engine_that_ignores_the_abort_is_killed():
    async def main(backend):
        assert (await hear(backend.open(job(range(20))))).ids == {0: list(range(20))}
        assert "SIGKILL" in reasons[0]

    reasons = []
    died = Backend._dead

    def noted(self, engine):
        died(self, engine)
        reasons.append(self.reason)

    deaf = (
        "import signal, sys, runpy, faulthandler; faulthandler.disable();"
        "signal.signal(signal.SIGABRT, signal.SIG_IGN);"
        f"sys.argv[0] = {scripted_engine.COMMAND[1]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    limits = HangLimits(floor=0.4, interval=0.1, kill_grace=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "_dead", noted)
        play(main, die("sent", 8, "hang"), limits=limits, command=[sys.executable, "-c", deaf])


def test_a_slow_step_that_was_predicted_slow_is_not_killed():
    async def main(backend):
        assert (await hear(backend.open(job([1, 2])))).ids == {0: [1, 2]}
        assert backend.snapshot()["engine_deaths"] == 0

    play(main, {"prefill_seconds": 1.2}, limits=QUICK)


def test_a_front_that_was_asleep_does_not_kill_its_engine():
    async def main(backend):
        opened = backend.open(job([1, 2]))
        await backend.wait_ready()
        await asyncio.sleep(0.2)
        os.kill(backend.snapshot()["engine"]["pid"], signal.SIGSTOP)
        threading.Timer(1.4, os.kill, (backend.snapshot()["engine"]["pid"], signal.SIGCONT)).start()
        time.sleep(1.2)
        assert (await hear(opened)).ids == {0: [1, 2]}
        assert backend.snapshot()["engine_deaths"] == 0

    play(main, {"token_seconds": 0.3}, limits=HangLimits(floor=0.8, slack=0.0, interval=0.1))


@pytest.mark.parametrize(("signal", "most"), [("SIGABRT", 2), ("exit:1", 2), ("SIGSEGV", 4), ("SIGKILL", 4)])
@pytest.mark.parametrize("at", ["prefill", "decode"])
def test_a_poisoned_request_fails_alone(at, signal, most):
    async def main(backend):
        good = [backend.open(job(range(base, base + 400))) for base in (0, 1000)]
        bad = backend.open(job([1, 666, 2] * 9))
        with pytest.raises(PenstockError) as caught:
            await hear(bad)
        assert caught.value.kind is Kind.ENGINE_DIED
        assert all(ticket.stats.generated[0] < 400 for ticket in good), "they were on board at every death"
        for base, ticket in zip((0, 1000), good, strict=True):
            assert (await hear(ticket)).ids == {0: list(range(base, base + 400))}
        assert backend.snapshot()["engine_deaths"] <= most + (at == "decode")

    fault = {"at": at, "contains": [666], "do": signal}
    play(main, {"faults": [fault], "token_seconds": 0.001})


def test_two_poisoned_among_eight_fail_each_alone():
    async def main(backend):
        good = [backend.open(job(range(base, base + 400))) for base in range(1000, 7000, 1000)]
        bad = [backend.open(job([1, 666, n] * 9)) for n in (2, 3)]
        for ticket in bad:
            with pytest.raises(PenstockError) as caught:
                await hear(ticket)
            assert caught.value.kind is Kind.ENGINE_DIED
        assert all(ticket.stats.generated[0] < 400 for ticket in good), "they were on board at every death"
        for base, ticket in zip(range(1000, 7000, 1000), good, strict=True):
            assert (await hear(ticket)).ids == {0: list(range(base, base + 400))}

    play(main, {"faults": [{"at": "decode", "contains": [666], "do": "SIGABRT"}], "token_seconds": 0.001})


def test_an_engine_that_dies_right_after_ready_halts_and_says_its_traceback_once(caplog):
    async def main(backend):
        opened = backend.open(job([1]))
        with pytest.raises(PenstockError, match="3 times in a row without progress") as caught:
            await hear(opened)
        assert caught.value.kind is Kind.ENGINE_HALTED

    play(main, {"faults": [{"at": "message", "n": 1, "do": "raise"}]})
    assert caplog.text.count("RuntimeError: a scripted failure") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_restarts_leak_neither_descriptors_nor_threads():
    def counts():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    async def main(backend):
        await backend.wait_ready()
        before = counts()
        for _ in range(10):
            os.kill(backend.snapshot()["engine"]["pid"], signal.SIGKILL)
            await until(lambda: backend.state != "ready")
            await until(lambda: backend.state == "ready")
        await until(lambda: threading.active_count() <= before[1])
        assert counts() == before
        assert backend.snapshot()["engine_deaths"] == 10
        assert (await hear(backend.open(job([1])))).ids == {0: [1]}

    play(main, policy=Policy(backoff=0.0))


def test_a_stalled_engine_is_told_and_an_idle_one_is_not():
    async def main(backend):
        await backend.wait_ready()
        os.kill(backend.snapshot()["engine"]["pid"], signal.SIGSTOP)
        await until(lambda: backend.state == "stalled")
        assert "no progress" in backend.reason
        os.kill(backend.snapshot()["engine"]["pid"], signal.SIGCONT)
        assert (await hear(backend.open(job([1])))).ids == {0: [1]}
        await until(lambda: backend.state == "ready")
        assert backend.reason is None
        assert backend.snapshot()["engine_deaths"] == 0

    play(main, {"idle_beat": 0.05}, limits=HangLimits(floor=1.0, interval=0.1))
