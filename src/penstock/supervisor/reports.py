"""What the engine's report of a step brings open sequences: into the journal, then to their tickets.

Each id is in the journal before a client can see it. This is the path of every token: what is counted here
costs each of them a comparison and an addition.
"""

from __future__ import annotations

from time import monotonic

from penstock import wire
from penstock.supervisor.journal import Journal
from penstock.supervisor.machine import SequenceState
from penstock.supervisor.observer import Observer


def take(step: wire.Step, journal: Journal, observer: Observer) -> bool:
    """Everything of a step but its ends, which are the backend's. True: some sequence has come further."""
    get, is_open, now = journal.get, SequenceState.OPEN, monotonic()
    progress = bool(step.rows or step.ended)
    for started in step.started:
        entry = get(started.id)
        if entry is not None and not entry.delivered:
            stats = entry.ticket.stats
            stats.cached = max(stats.cached, started.cached)
            stats.why = started.why
            stats.first_prefill = stats.first_prefill or now
            if not stats.restarts:
                observer.started(entry, started.cached)
    for prefill in step.prefill:
        entry = get(prefill.id)
        if entry is not None and entry.life.is_open:
            observer.prefilled(entry, prefill.done)
            progress |= entry.prefill_came(prefill.done)
            entry.ticket.put_progress(entry.choice, prefill.done, prefill.total)
    for row in step.rows:
        entry = get(row.id)
        if entry is not None and entry.life.state is is_open:
            entry.delivered.extend(row.tokens)
            entry.stage = "decode"
            if entry.told:
                observer.gaps.observe(now - entry.told)
            elif entry.choice == 0:
                observer.first_token.observe(now - entry.ticket.stats.submitted)
            entry.told = now
            entry.ticket.put_tokens(entry.choice, row.tokens, row.logprobs, row.top)
    return progress
