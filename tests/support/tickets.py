"""Reading tickets to their end in tests, with a deadline instead of a hang."""

from __future__ import annotations

import asyncio
from array import array
from collections import defaultdict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from penstock import wire
from penstock.supervisor.backend import Done, Finished, Job, Progress, Ticket, Tokens

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], seconds: float = 30.0) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(main, seconds)

    return asyncio.run(bounded())


def job(ids: list[int] | range, **fields: Any) -> Job:
    sampling = wire.Sampling(**fields.pop("sampling", {}))
    return Job(array("I", ids), sampling, **fields)


@dataclass
class Heard:
    """What a ticket said: ids and reason of each choice, and how often prefill progress came."""

    ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, str] = field(default_factory=dict)
    progress: list[tuple[int, int]] = field(default_factory=list)


async def hear(ticket: Ticket, patience: float = 20.0) -> Heard:
    """Everything until Done. Raises what the ticket raises; fails on a token or an end after an end."""
    heard = Heard()
    while True:
        try:
            event = await asyncio.wait_for(ticket.next(), patience)
        except Done:
            return heard
        except TimeoutError:
            raise AssertionError(f"nothing for {patience:g} s") from None
        match event:
            case Tokens():
                assert event.choice not in heard.reasons
                heard.ids[event.choice] += event.ids
            case Finished():
                assert event.choice not in heard.reasons
                heard.reasons[event.choice] = event.reason
            case Progress():
                heard.progress.append((event.done, event.total))
