"""A `Status` as a picture for the terminal. Pure: it asks nobody and looks at no clock.

Every owner of memory has a sign of its own beside its colour, so the bar reads without colours, too.
Invariant: live, the picture is as high as the terminal at most; requests that don't fit are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from penstock.sizes import gigabytes
from penstock.status import Event, Memory, Request, Status

OWNERS = (
    ("weights", "weights", "█", "blue"),
    ("live_kv", "running", "▓", "green"),
    ("states", "states", "▚", "cyan"),
    ("cached", "cached", "▒", "yellow"),
    ("grammars", "grammars", "▥", "bright_magenta"),
    ("transient", "step", "▤", "magenta"),
    ("pool", "pool", "░", "bright_black"),
)
"""Each owner's name there and here, its sign and its colour, as they stand in the bar."""
COLOURS = {"ready": "green", "stalled": "red", "halted": "red", "error": "red", "warning": "yellow"}
QUIET = "default not bold dim"
WIDE = 110
"""Columns from which on requests tell why no more of them was cached."""
EVENTS = 3
PREFILL = 10
"""Columns of a prefill's bar."""


class View:
    """The picture. `silent`: seconds for which there was no answer; `whole`: whatever its height."""

    def __init__(self, told: Status, *, silent: float = 0.0, whole: bool = False) -> None:
        self.told, self.silent, self.whole = told, silent, whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        told = self.told
        above = Group(
            _head(told, self.silent), _bar(told.memory, options.max_width), _legend(told.memory), ""
        )
        below = Group("", _cache(told), *(_events(told.events[:EVENTS]) if told.events else ()))
        taken = sum(len(console.render_lines(part, options.update(height=None))) for part in (above, below))
        rows = None if self.whole else max(1, console.height - taken - 3)
        yield above
        yield Text(f"{told.running} running, {told.queued} queued", "bold")
        if told.requests:
            yield _requests(told, rows, wide=options.max_width >= WIDE)
        yield below


def _head(told: Status, silent: float) -> RenderableType:
    colour = COLOURS.get(told.state, "yellow")
    state = (
        Text(f"no answer for {silent:.0f} s", "bold red") if silent else Text(told.state, f"bold {colour}")
    )
    head = Table.grid(expand=True)
    head.add_column(no_wrap=True)
    head.add_column(justify="right", no_wrap=True)
    head.add_row(Text(told.model, "bold"), state.append(f", up {_time(told.uptime)}", QUIET))
    reason = told.reason or (told.stage if told.state in ("loading", "restarting") else "")
    return Group(head, Text(reason, colour)) if reason else head


def _bar(memory: Memory, width: int) -> Text:
    whole = max(memory.budget or 0, memory.held, 1)
    bar, end, held = Text(no_wrap=True), 0, 0
    for name, _, sign, colour in OWNERS:
        held += memory.owners.get(name, 0)
        cells = round(width * held / whole) - end
        bar.append(sign * cells, colour)
        end += cells
    return bar.append("·" * (width - end), "dim")


def _legend(memory: Memory) -> RenderableType:
    if memory.budget is None or memory.ceiling is None:
        return Text("no engine holds memory yet", "dim")
    words = Text(f"{gigabytes(memory.held)} of {gigabytes(memory.budget)} ({memory.budget_decided_by})")
    if memory.ceiling != memory.budget:
        words.append(f", at most {gigabytes(memory.ceiling)} ({memory.ceiling_decided_by})", "dim")
    parts = [
        Text(sign, colour).append(f" {word} {gigabytes(size)}", "default")
        for name, word, sign, colour in OWNERS
        if (size := memory.owners.get(name))
    ]
    return Group(words, Columns(parts, padding=(0, 3))) if parts else words


def _requests(told: Status, rows: int | None, *, wide: bool) -> RenderableType:
    # Who runs comes first: those who wait are all alike.
    order = sorted(told.requests, key=lambda request: request.stage == "queued")
    shown = order if rows is None or len(order) <= rows else order[: rows - 1]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("request", no_wrap=True, min_width=8)
    table.add_column("stage", no_wrap=True, width=22)
    for heading in ("prompt", "cached", "tokens", "tok/s", " memory", "  time"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    if wide:
        table.add_column("why not more cached", no_wrap=True, style="dim")
    for request in shown:
        table.add_row(*_row(request), *([request.why] if wide else []))
    left = len(order) - len(shown)
    return Group(table, Text(f"and {left} more", "dim")) if left else table


def _row(request: Request) -> tuple[RenderableType, ...]:
    return (
        request.id[:8],
        _stage(request),
        f"{request.prompt:,}",
        f"{request.cached:,}",
        f"{request.generated:,}" if request.generated else "",
        f"{request.tokens_per_second:.1f}" if request.tokens_per_second else "",
        gigabytes(request.bytes) if request.bytes else "",
        _time(request.seconds),
    )


def _stage(request: Request) -> Text:
    if request.stage == "decode":
        return Text("decode", "green")
    if request.stage == "queued":
        return Text("gave way, waits" if request.preempted else "queued", "dim")
    share = request.prefilled / max(1, request.prompt)
    full = round(PREFILL * share)
    left = "" if request.eta is None else f", {_time(request.eta)}"
    bar = Text("━" * full, "yellow").append("─" * (PREFILL - full), "bright_black")
    return bar.append(f" {share:.0%}{left}", "yellow")


def _cache(told: Status) -> Text:
    cache, evicted = told.cache, sum(told.cache.evicted.values())
    states = f", {cache.checkpoints:,} states" if cache.checkpoints else ""
    line = Text("cache ", "bold").append(f"{gigabytes(cache.bytes)}: {cache.tokens:,} tokens", "not bold")
    line.append(f" in {cache.nodes:,} nodes{states}", "not bold")
    if cache.queries:
        hit = f"; {cache.hits / cache.queries:.0%} of {cache.queries:,} prompt tokens were there"
        line.append(hit, "not bold")
    return line.append(f"; {gigabytes(evicted)} evicted" if evicted else "", "not bold")


def _events(events: list[Event]) -> tuple[RenderableType, ...]:
    table = Table.grid(padding=(0, 1))
    for event in events:
        times = f" ({event.count:,} times)" if event.count > 1 else ""
        words = Text(event.message + times, COLOURS.get(event.level, ""))
        when = datetime.fromtimestamp(event.time).strftime("%H:%M:%S")
        table.add_row(Text(when, "dim"), words.append(f" {event.advice}", QUIET))
    return "", table


def _time(seconds: float) -> str:
    """'41 s', '12 min', '3 h 20 min', '5 d 2 h'."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
