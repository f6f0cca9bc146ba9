"""Agents' traffic through the tree: what it saves against foresight, and what it stores."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tests.support.agent_traffic import STATE, Oracle, OracleTree, Request, Traffic, serve

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


@pytest.mark.parametrize("kind", [BURSTS, CROWDED], ids=["bursts", "crowded"])
@pytest.mark.parametrize("drift", [False, True], ids=["agent", "drift"])
@pytest.mark.parametrize("stateful", [False, True], ids=["dense", "hybrid"])
def test_hits_against_foresight(kind: dict, drift: bool, stateful: bool) -> None:
    requests = Traffic(1, drift, **kind).requests(120)
    unique = serve(requests, Tree()).stored
    ample = serve(requests, Tree(stateful, STATE)).cached / best(requests, stateful)
    scarce = serve(requests, Tree(stateful, STATE, max_bytes=unique // 3)).cached
    scarce /= best(requests, stateful, unique // 3)
    marks = (0.85, 0.75) if stateful and drift else (0.95, 0.85)
    assert ample >= marks[0], f"{ample:.3f} of the best with ample memory"
    assert scarce >= marks[1], f"{scarce:.3f} of the best at a third of the working set"


def test_every_id_is_stored_once() -> None:
    requests = Traffic(2, drift=True).requests(60)
    tree = Tree()
    serve(requests, tree)
    sequences = sorted(request.prompt + request.answer[:-1] for request in requests)
    shared = sum(differs(one, two) for one, two in pairwise(sequences))
    unique = sum(map(len, sequences)) - shared
    assert tree.tokens == unique
    assert tree.bytes == unique


def test_states_stay_few_beside_long_prefixes() -> None:
    """As in the report: prompts of 55,000 ids and more, from one agent."""
    traffic = Traffic(3, live=1)
    traffic.base = traffic.words(50_000)
    traffic.live = [traffic.session(left=20)]
    requests = traffic.requests(20)
    tree = Tree(stateful=True, state_tokens=STATE)
    done = serve(requests, tree)
    assert done.stored <= 1.6 * tree.tokens
    dense = serve(requests, Tree())
    assert done.cached >= 0.98 * dense.cached


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
