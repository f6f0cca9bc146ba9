"""Agents' traffic through the tree: what it saves against foresight, and what it stores."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tests.support.agent_traffic import STATE, Oracle, OracleTree, Request, Traffic, report, serve

from penstock.cache.checkpoints import differs
from penstock.cache.tree import Tree

CROWDED = {"live": 12, "switch": 0.9}
"""Twelve sessions at once, nearly every turn another's."""
BURSTS = {"live": 4, "switch": 0.25}


def best(requests: list[Request], stateful: bool, max_bytes: int | None = None) -> int:
    """Ids that an eviction with foresight saves, every checkpoint of the grid kept until bytes are short."""
    tree = OracleTree(stateful, STATE, max_bytes=max_bytes)
    tree.oracle = Oracle(requests)
    return serve(requests, tree, tree.oracle).cached


PROFILES = {
    "issue1390": lambda: report(**BURSTS),
    "agent-bursts": lambda: Traffic(1, **BURSTS).requests(120),
    "agent-crowded": lambda: Traffic(1, **CROWDED).requests(120),
    "drift-bursts": lambda: Traffic(1, drift=True, **BURSTS).requests(120),
    "drift-crowded": lambda: Traffic(1, drift=True, **CROWDED).requests(120),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("stateful", [False, True], ids=["dense", "hybrid"])
def test_hits_against_foresight(profile: str, stateful: bool) -> None:
    requests = PROFILES[profile]()
    unique = serve(requests, Tree()).stored
    ample = serve(requests, Tree(stateful, STATE)).cached / best(requests, stateful)
    scarce = serve(requests, Tree(stateful, STATE, max_bytes=unique // 3)).cached
    scarce /= best(requests, stateful, unique // 3)
    print(f"{profile}: {ample:.3f} of the best with ample memory, {scarce:.3f} at a third")
    marks = (0.85, 0.75) if stateful and "drift" in profile else (0.95, 0.85)
    assert ample >= marks[0]
    assert scarce >= marks[1]


def test_every_id_is_stored_once() -> None:
    requests = Traffic(2, drift=True).requests(60)
    tree = Tree()
    serve(requests, tree)
    sequences = sorted(request.prompt + request.answer[:-1] for request in requests)
    shared = sum(differs(one, two) for one, two in pairwise(sequences))
    unique = sum(map(len, sequences)) - shared
    assert tree.tokens == unique
    assert tree.bytes == unique


@pytest.mark.parametrize("seed", range(3))
def test_the_reports_traffic_is_stored_once_and_its_states_are_few(seed: int) -> None:
    """A state is as big as 1,500 ids; all prompts of a session begin with those before."""
    requests = report(seed)
    dense, hybrid = Tree(), Tree(stateful=True, state_tokens=STATE)
    once, with_states = serve(requests, dense), serve(requests, hybrid)
    print(f"stored ÷ unique: {once.stored / dense.tokens:.3f}, {with_states.stored / hybrid.tokens:.3f}")
    assert once.stored <= 1.10 * dense.tokens
    assert with_states.stored <= 1.30 * hybrid.tokens
    assert with_states.cached >= 0.995 * once.cached


def test_the_states_of_short_sessions_are_no_more_than_they_need() -> None:
    """Twelve at once, 3,000 ids each behind 9,000 that they share: a state at an end is half of that."""
    tree = Tree(stateful=True, state_tokens=STATE)
    done = serve(Traffic(1, **CROWDED).requests(60), tree)
    states = (tree.bytes - tree.tokens) / STATE / tree.entries
    print(f"{states:.1f} states a session, stored ÷ unique: {done.stored / tree.tokens:.2f}")
    assert states <= 5.5


@pytest.mark.parametrize("drift", [False, True], ids=["kept", "stripped"])
def test_a_turn_computes_what_is_new(drift: bool) -> None:
    """Whether turns end in a tool's or a user's message, and thinking is kept or stripped."""
    traffic = Traffic(4, drift, live=1)
    traffic.live[0].left = 20
    tree = Tree(stateful=True, state_tokens=STATE)
    for number, request in enumerate(traffic.requests(20)):
        match = tree.match("", request.prompt[:-1])
        if number > 0:
            assert match.length - match.usable <= 64, "states are where the turns part"
        serve([request], tree)
