"""Tickets: nothing lost to a cancelled reader, slow readers bounded, one end per choice."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from tests.support.tickets import hear, job, run

from penstock.errors import Kind, PenstockError
from penstock.supervisor.ticket import Done, Finished, Progress, Ticket, Tokens


def ticket(n=1, end=lambda id, keep: None):
    return Ticket(job(range(5), n=n), list(range(1, n + 1)), end)


def test_a_cancelled_reader_loses_nothing():
    async def main():
        opened, taken = ticket(), []
        for id in range(60):
            reader = asyncio.create_task(opened.next())
            for moment in range(3):
                if moment == id % 3:
                    opened.put_tokens(0, [id], None, None)
                if moment == id % 2:
                    await asyncio.sleep(0)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                taken += (await reader).ids
        opened.put_finished(0, "stop", 60)
        left = (await hear(opened)).ids[0]
        assert taken
        assert left
        return taken + left

    assert run(main()) == list(range(60))


def test_what_waits_for_a_slow_reader_is_merged():
    async def main():
        opened = ticket(n=2)
        for id in range(100):
            opened.put_tokens(0, [id], [float(id)], [[(id, 0.5)]])
        opened.put_tokens(1, [7], None, None)
        first = await opened.next()
        assert first == Tokens(
            0, list(range(100)), [float(i) for i in range(100)], [[(i, 0.5)] for i in range(100)]
        )
        assert await opened.next() == Tokens(1, [7])
        for done in range(100):
            opened.put_progress(0, done, 100)
            opened.put_progress(1, done, 100)
        assert await opened.next() == Progress(99, 100)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(opened.next(), 0.01)

    run(main())


def test_ids_that_wait_behind_a_cut_are_dropped():
    async def main():
        opened = ticket(n=2)
        opened.put_tokens(0, [1, 2], None, None)
        opened.put_tokens(1, [5], None, None)
        opened.put_tokens(0, [3], None, None)
        opened.put_finished(0, "cut", 1)
        opened.put_finished(1, "stop", 1)
        heard = await hear(opened)
        assert heard.ids == {1: [5]}
        assert heard.reasons == {0: "cut", 1: "stop"}
        assert opened.stats.generated == [1, 1]

    run(main())


def test_ends_reach_the_backend_once():
    ends = []

    def end(id, keep):
        ends.append((id, keep))
        opened.put_finished(id - 1, "cut", 0)

    opened = ticket(n=3, end=end)
    opened.end(1, 7)
    opened.end(1, 7)
    opened.close()
    opened.close()
    assert ends == [(2, 7), (1, None), (3, None)]
    with pytest.raises(Done):
        run(opened.next())


def test_a_failed_choice_fails_the_ticket_and_ends_the_others():
    async def main():
        ended = []
        opened = ticket(n=2, end=lambda id, keep: ended.append(id))
        opened.put_tokens(0, [1], None, None)
        opened.put_failure(0, PenstockError(Kind.ENGINE_DIED, "died"))
        assert ended == [2]
        assert await opened.next() == Tokens(0, [1])
        for _ in range(2):
            with pytest.raises(PenstockError, match="died"):
                await opened.next()

    run(main())


def test_stats_tell_the_times_in_order():
    async def main():
        opened = ticket()
        opened.put_progress(0, 5, 5)
        opened.put_tokens(0, [1, 2], None, None)
        opened.put_finished(0, "stop", 2)
        stats = opened.stats
        assert stats.submitted <= stats.first_prefill <= stats.first_token
        assert stats.generated == [2]
        assert await opened.next() == Progress(5, 5)
        assert await opened.next() == Tokens(0, [1, 2])
        assert await opened.next() == Finished(0, "stop")

    run(main())
