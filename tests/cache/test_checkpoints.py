"""Where states are kept: borders in the ids of several templates, positions and thinning under any input."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cache.checkpoints import MOST, RECENT, borders, differs, learn, positions, surplus
from penstock.cache.nodes import Checkpoint

BOS, START, END, HEAD, TAIL, USER, BOT, INST, DONE, EOS = range(10)
SPECIAL = frozenset(range(10))
NAMES = {"system": 91, "user": 92, "assistant": 93, "tool": 94}
Message = tuple[str, list[int]]


def chatml(messages: list[Message]) -> list[int]:
    return [x for role, text in messages for x in (START, NAMES[role], *text, END, 10)]


def llama(messages: list[Message]) -> list[int]:
    return [BOS, *(x for role, text in messages for x in (HEAD, NAMES[role], TAIL, *text, END))]


def instruct(messages: list[Message]) -> list[int]:
    """Only what users say is between marks; an answer ends with EOS."""
    parts = [[INST, *text, DONE] if role == "user" else [*text, EOS] for role, text in messages]
    return [BOS, *(x for part in parts for x in part)]


def roles(messages: list[Message]) -> list[int]:
    """A marker for each role, none for the system's text."""
    marks = {"user": [USER], "assistant": [BOT], "system": []}
    ends = {"user": [], "assistant": [EOS], "system": []}
    return [BOS, *(x for role, text in messages for x in (*marks[role], *text, *ends[role]))]


def plain(messages: list[Message]) -> list[int]:
    """No special ids: this template resists."""
    return [x for role, text in messages for x in (NAMES[role], *text)]


PROBE: list[Message] = [("user", [50, 51]), ("assistant", [52]), ("user", [53, 54])]
CHAT: list[Message] = [
    ("system", [60, 61, 62]), ("user", [63, 64]), ("assistant", [65, 66]), ("user", [67]), ("assistant", [68])
]  # fmt: skip


@pytest.mark.parametrize("render", [chatml, llama, roles])
def test_borders_are_where_messages_begin(render: Callable[[list[Message]], list[int]]) -> None:
    markers = learn([render(PROBE[:n]) for n in (1, 2, 3)], SPECIAL)
    starts = [len(render(CHAT[:n])) for n in range(1, len(CHAT))]
    assert borders(array("I", render(CHAT)), markers) == starts


def test_borders_of_a_template_that_closes_messages() -> None:
    markers = learn([instruct(PROBE[:n]) for n in (1, 2, 3)], SPECIAL)
    assert (markers.openers, markers.closers) == ({INST}, {DONE})
    chat = CHAT[1:]
    starts = [len(instruct(chat[:n])) for n in range(1, len(chat))]
    assert borders(array("I", instruct(chat)), markers) == starts


def test_a_template_that_resists() -> None:
    markers = learn([plain(PROBE[:n]) for n in (1, 2, 3)], SPECIAL)
    assert not markers.openers | markers.closers
    assert borders(array("I", plain(CHAT)), markers) == []
    assert positions(10_000, [], 0, None, 1_000) == [1_000 * n for n in (2, 6, 8, 9, 10)]
    assert learn([], SPECIAL).openers == frozenset()


def test_the_generation_prompt_is_a_border() -> None:
    markers = learn([chatml(PROBE[:n]) for n in (1, 2, 3)], SPECIAL)
    prompt = chatml(CHAT[:4])
    assert borders(array("I", [*prompt, START, NAMES["assistant"]]), markers)[-1] == len(prompt)


def test_markers_in_a_text_cost_borders_only() -> None:
    markers = learn([chatml(PROBE[:n]) for n in (1, 2, 3)], SPECIAL)
    ids = array("I", chatml([("user", [50, START, START, 51]), ("assistant", [52])]))
    assert borders(ids, markers) == [3, 4, 8]


WORDS = st.lists(st.sampled_from([1, 1 + (1 << 24)]), max_size=300)


@given(WORDS, WORDS)
def test_differs(first: list[int], second: list[int]) -> None:
    assert differs(first, second) == next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    assert differs(first, [*first, *second]) == len(first)


def test_positions_in_their_order() -> None:
    edges = [5_000, 7_000, 8_000, 8_500, 9_000]
    assert positions(9_010, edges, 0, 6_000, 1_500, turn=7_001) == [5_000, 6_000, 7_001, 8_000, 8_500, 9_000]
    assert positions(9_010, edges, 8_000, 6_000, 1_500) == [8_500, 9_000], (
        "what is there already is not asked"
    )
    assert positions(9_010, [9_000], 0, None, 1_500) == [3_010, 6_010, 9_000]


@given(st.data())
def test_positions_keep_their_bounds(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 70_000))
    start = data.draw(st.integers(0, length))
    places = st.integers(0, length + 10)
    edges = data.draw(st.lists(places, max_size=9))
    parted, turn = data.draw(st.none() | places), data.draw(st.none() | places)
    state = data.draw(st.integers(0, 5_000))
    found = positions(length, edges, start, parted, state, turn)
    assert len(found) <= MOST
    assert found == sorted(set(found))
    assert all(start < position <= length for position in found)
    wanted = {*edges, parted, turn, length}
    for position in set(found) - wanted:
        others = [start, *(other for other in found if other != position)]
        assert all(abs(position - other) >= state for other in others), "never closer than a state's size"
    if edges and start < max(edges) <= length:
        assert max(edges) in found, "the generation prompt's start comes first"


def states(*places: int, anchors: tuple[int, ...] = ()) -> list[Checkpoint]:
    return [Checkpoint(None, place, 1, 0, place in anchors) for place in places]


@given(st.sets(st.integers(1, 60_000), max_size=40), st.integers(1, 3_000), st.data())
def test_thinning_covers(places: set[int], state: int, data: st.DataObject) -> None:
    spared = data.draw(st.sets(st.sampled_from(sorted(places)))) if places else set()
    gone = set(surplus(states(*places), spared, state))
    kept = sorted(places - gone)
    assert gone <= places - spared
    assert set(sorted(places)[-RECENT:]) <= set(kept)
    for place in gone:
        deeper = min(other for other in kept if other > place)
        shallower = max((other for other in kept if other < place), default=0)
        assert deeper - shallower < max(state, max(places) - deeper)
    assert set(surplus(states(*kept), spared, state)) == set(), "thinned once is thinned"


def test_thinning_of_a_session_that_grows() -> None:
    """Few stay, and wherever it is taken up again, little more is computed than lay behind that point."""
    kept: list[int] = []
    end = 0
    for turn in range(1, 120):
        kept += [turn * 1_000, turn * 1_000 + 300]
        gone = surplus(states(*kept), (), 1_500)
        kept = [place for place in kept if place not in gone]
        end = kept[-1]
    assert len(kept) <= RECENT + 2 * 7
    for deeper, shallower in zip(kept[::-1], [*kept[-2::-1], 0], strict=True):
        assert deeper - shallower <= max(1_500, end - deeper) + 1_000


def test_thinning_spares_anchors() -> None:
    places = [1_000, *range(2_000, 30_000, 200)]
    gone = surplus(states(*places, anchors=(1_000, 2_200, 9_000, 21_400)), (), 1_500)
    assert not {1_000, 9_000, 21_400} & set(gone), "the first and the two latest"
    assert 2_200 in gone
