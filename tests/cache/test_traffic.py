"""Agents' traffic through the tree: what it saves against foresight, and what it stores."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from tests.support.agent_traffic import STATE, Oracle, OracleTree, Request, extend, requests, serve
from tests.support.tree_laws import check

from penstock.cache.checkpoints import differs
from penstock.cache.nodes import Cover, Node, below
from penstock.cache.tree import Tree
from penstock.traffic.profiles import Event, agent, issue1390

CROWDED = {"live": 12, "switch": 0.9}
"""Twelve sessions at once, nearly every turn another's."""
BURSTS = {"live": 4, "switch": 0.25}


def best(made: list[Request], stateful: bool, max_bytes: int | None = None) -> int:
    """Ids that an eviction with foresight saves, every checkpoint of the grid kept until bytes are short."""
    tree = OracleTree(stateful, STATE, max_bytes=max_bytes)
    tree.oracle = Oracle(made)
    return serve(made, tree, tree.oracle).cached


HALF = 0.5
"""Half of the lengths: 9,000 ids of system prompt and tools, 440 a turn."""


def drift(seed: int, sessions: int) -> list[Event]:
    """The profile as it reaches the cache: the line that opens each session's prompt is not a part of it."""
    return [replace(event, system=event.system[1:]) for event in agent(seed, HALF, sessions, drift=True)]


PROFILES = {
    "issue1390": lambda: requests(issue1390(), **BURSTS),
    "agent-bursts": lambda: requests(agent(1, HALF, 30), 120, **BURSTS),
    "agent-crowded": lambda: requests(agent(1, HALF, 30), 120, **CROWDED),
    "drift-bursts": lambda: requests(drift(1, 30), 120, **BURSTS),
    "drift-crowded": lambda: requests(drift(1, 30), 120, **CROWDED),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("stateful", [False, True], ids=["dense", "hybrid"])
def test_hits_against_foresight(profile: str, stateful: bool) -> None:
    made = PROFILES[profile]()
    unique = serve(made, Tree()).stored
    ample = serve(made, Tree(stateful, STATE)).cached / best(made, stateful)
    scarce = serve(made, Tree(stateful, STATE, max_bytes=unique // 3)).cached
    scarce /= best(made, stateful, unique // 3)
    print(f"{profile}: {ample:.3f} of the best with ample memory, {scarce:.3f} at a third")
    marks = (0.85, 0.75) if stateful and "drift" in profile else (0.95, 0.85)
    assert ample >= marks[0]
    assert scarce >= marks[1]


def test_every_id_is_stored_once() -> None:
    made = requests(agent(2, HALF, 12, drift=True), 60)
    tree = Tree()
    serve(made, tree)
    sequences = sorted(request.prompt + request.answer[:-1] for request in made)
    shared = sum(differs(one, two) for one, two in pairwise(sequences))
    unique = sum(map(len, sequences)) - shared
    assert tree.tokens == unique
    assert tree.bytes == unique


@pytest.mark.parametrize("seed", range(3))
def test_the_reports_traffic_is_stored_once_and_its_states_are_few(seed: int) -> None:
    """A state is as big as 1,500 ids; all prompts of a session begin with those before."""
    made = requests(issue1390(seed))
    dense, hybrid = Tree(), Tree(stateful=True, state_tokens=STATE)
    once, with_states = serve(made, dense), serve(made, hybrid)
    print(f"stored ÷ unique: {once.stored / dense.tokens:.3f}, {with_states.stored / hybrid.tokens:.3f}")
    assert once.stored <= 1.10 * dense.tokens
    assert with_states.stored <= 1.30 * hybrid.tokens
    assert with_states.cached >= 0.995 * once.cached


def kv_over_ids(tree: Tree, rows: list[Cover], shared: int) -> float:
    """K/V of tree and rows ÷ (unique ids + one copy of the shared prefix per additional row)."""
    states = sum(kept.size for node in nodes_of(tree) for kept in node.checkpoints.values())
    held = tree.bytes - states + sum(row.length for row in rows)
    return held / max(1, tree.tokens + shared * max(0, len(rows) - 1))


@pytest.mark.parametrize("stateful", [False, True], ids=["dense", "hybrid"])
@pytest.mark.parametrize(("sessions", "at_once"), [(1, 1), (3, 2), (10, 1), (10, 4)])
def test_with_live_rows_the_reports_traffic_is_held_once(sessions: int, at_once: int, stateful: bool) -> None:
    """At every step of rows that overlap. What a row holds alone is copied back when it ends."""
    made = requests(issue1390(0, 1.0, sessions))
    shared = min(request.borders[0] for request in made)  # everybody's system prompt
    tree = Tree(stateful, STATE)
    rows: dict[Cover, Request] = {}
    worst, back = 0.0, 0

    def look() -> None:
        nonlocal worst
        worst = max(worst, kv_over_ids(tree, list(rows), shared))

    def end(now: int) -> None:
        nonlocal back
        row = next(iter(rows))
        del rows[row]
        runs = tree.unpacked(row)
        back += sum(count for _, count in runs)
        tree.drop(row, now, [((now, at), count, count) for at, count in runs])
        look()

    for now, request in enumerate(made):
        while len(rows) == at_once or any(request.prompt[: len(r.prompt)] == r.prompt for r in rows.values()):
            end(now)
        match = tree.match("", request.prompt[:-1])
        tree.unpin(tree.pin(match, now), now)
        row = tree.lend("", (now, 0))
        rows[row] = request
        whole = request.prompt + request.answer[:-1]
        for upto in (match.usable, (match.usable + len(whole)) // 2, len(whole)):
            extend(tree, row, whole[:upto], now)
            tree.shed(row, now)
            look()
        if stateful:
            for place in (request.borders[0], len(request.prompt)):
                tree.keep(row, place, (now, place), STATE, now)
    while rows:
        end(len(made))
    check(tree)
    print(f"{sessions} sessions: at most {worst:.3f}, {back / len(made):,.0f} ids a turn copied back")
    assert worst <= 1.15
    assert tree.tokens == sum(s.end - s.start for node in nodes_of(tree) for s in node.segments)


def nodes_of(tree: Tree) -> list[Node]:
    return [node for root in tree._roots.values() for node in below(root)]


def test_the_states_of_short_sessions_are_no_more_than_they_need() -> None:
    """Twelve at once, each with a few thousand ids behind 9,000 that they share."""
    tree = Tree(stateful=True, state_tokens=STATE)
    done = serve(requests(agent(1, HALF, 30), 60, **CROWDED), tree)
    states = (tree.bytes - tree.tokens) / STATE / tree.entries
    print(f"{states:.1f} states a session, stored ÷ unique: {done.stored / tree.tokens:.2f}")
    assert states <= 5.5


@pytest.mark.parametrize("drift", [False, True], ids=["kept", "stripped"])
def test_a_turn_computes_what_is_new(drift: bool) -> None:
    """Whether turns end in a tool's or a user's message, and thinking is kept or stripped."""
    made = requests(agent(2, HALF, 1, drift=drift))
    assert len(made) >= 20
    tree = Tree(stateful=True, state_tokens=STATE)
    for number, request in enumerate(made):
        match = tree.match("", request.prompt[:-1])
        if number > 0:
            assert match.length - match.usable <= 64, "states are where the turns part"
        serve([request], tree)
