"""/v1/status with its history, and what an operator may do: end a request, drop the cached prefixes.

Answers from what the front knows, and never waits for the engine. Invariant: neither text nor ids of a prompt
is in an answer.
"""

from __future__ import annotations

import platform
from time import monotonic, time
from urllib.parse import parse_qs

from penstock import __version__
from penstock.api.exchange import Exchange
from penstock.api.generation import Generation
from penstock.api.params import invalid
from penstock.api.service import Service
from penstock.errors import Kind, PenstockError
from penstock.status import Request, Status


def status(service: Service) -> Status:
    """What is known at the moment, whatever the engine does."""
    backend, observer = service.backend, service.backend.observer
    known, ready = backend.snapshot(), backend.ready
    queued, running = observer.lines()
    memory = observer.memory()
    memory.front_held, memory.front_limit = service.admission.held, service.admission.limit
    versions = {"penstock": __version__, "python": platform.python_version()}
    return Status(
        model=service.model_name,
        state=backend.state,
        reason=backend.reason,
        stage=known["stage"],
        time=time(),
        uptime=monotonic() - observer.began,
        versions=versions | (ready.versions if ready is not None else {}),
        facts=ready,
        engine=known["engine"],
        memory=memory,
        running=running,
        queued=queued,
        requests=[_request(service, *opened) for opened in service.requests.values()],
        cache=observer.cache(),
        counts=observer.counts(),
        cancels=observer.cancels,
        finished=observer.finished,
        errors=service.errors,
        events=list(reversed(observer.events.last)),
        given_back=known["given_back"],
        decided_by="" if backend.status is None else backend.status.decided_by,
    )


def _request(service: Service, exchange: Exchange, run: Generation) -> Request:
    jobs, stats, now = run.plan.jobs, run.tickets[0].stats, monotonic()
    request = Request(
        id=exchange.id,
        path=exchange.path,
        stream=run.plan.stream,
        seconds=now - stats.submitted,
        prompt=sum(len(job.prompt) for job in jobs),
        cached=run.cached(),
        why=stats.why,
        generated=sum(sum(ticket.stats.generated) for ticket in run.tickets),
        max_tokens=jobs[0].max_tokens,
        restarts=stats.restarts,
        **service.backend.observer.of(run.tickets),
    )
    done, left = request.prefilled - stats.cached, len(jobs[0].prompt) - request.prefilled
    if request.stage == "prefill" and stats.first_prefill is not None and done > 0:
        request.eta = (now - stats.first_prefill) / done * left
    if stats.first_token is not None and now > stats.first_token:
        request.tokens_per_second = request.generated / (now - stats.first_token)
    return request


async def shown(service: Service, exchange: Exchange) -> None:
    """GET /v1/status."""
    await exchange.respond_json(200, status(service))


async def history(service: Service, exchange: Exchange) -> None:
    """GET /v1/status/history?since=, in seconds of Unix time."""
    query = parse_qs(exchange.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    given = query.get("since", ["0"])[-1]
    try:
        since = float(given)
    except ValueError:
        raise invalid("since", "this is not a number of seconds of Unix time.") from None
    await exchange.respond_json(200, service.backend.observer.history(since))


async def cancel(service: Service, exchange: Exchange) -> None:
    """POST /v1/requests/{id}/cancel. The id as in `x-request-id`, or the first part of it, as in the log."""
    asked: str = exchange.scope["path_params"]["id"]
    for id, (whose, run) in service.requests.items():
        if asked in (id, whose.name):
            run.cancel(PenstockError(Kind.CANCELLED, "The request was cancelled by the server's operator."))
            await exchange.respond_json(200, {"id": id, "cancelled": True})
            return
    raise PenstockError(Kind.NOT_FOUND, "No open request has this id; /v1/status lists those that are open.")


async def clear_cache(service: Service, exchange: Exchange) -> None:
    """POST /v1/cache/clear. False: no engine is up, and nothing is cached."""
    await exchange.respond_json(200, {"cleared": service.backend.clear_cache()})
