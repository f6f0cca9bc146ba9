from __future__ import annotations

import copy
from typing import Any

import pytest

from penstock.errors import Kind, PenstockError
from penstock.text.conversation import join_turns, normalise, tag_late_systems


def one(**message: Any) -> dict[str, Any]:
    return normalise([message])[0]


def test_parts_of_text_are_joined() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
        {"type": "refusal", "refusal": "c"},
    ]
    assert one(role="user", content=parts)["content"] == "abc"
    assert one(role="assistant", content=None)["content"] == ""


def test_roles_nulls_and_reasoning() -> None:
    assert one(role="developer", content="x", name=None) == {"role": "system", "content": "x"}
    assert one(role="assistant", content="x", reasoning="r")["reasoning_content"] == "r"
    assert one(role="assistant", content="x", reasoning_content="r")["thinking"] == "r"


def test_arguments_become_mappings() -> None:
    def arguments(sent: Any) -> Any:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": sent}}
        return one(role="assistant", tool_calls=[call])["tool_calls"][0]["function"]["arguments"]

    assert arguments('{"a": 1}') == {"a": 1}
    for nothing in (None, "", "null", "{}", {}):
        assert arguments(nothing) == {}
    assert arguments({"a": 1}) == {"a": 1}
    for other in ('{"a": ', "[1", "[1]", "5"):
        assert arguments(other) == {"arguments": other}
    assert one(role="assistant", tool_calls=["junk"])["tool_calls"] == ["junk"]
    assert "tool_calls" not in one(role="assistant", tool_calls=[])


@pytest.mark.parametrize(
    ("messages", "kind", "param"),
    [
        ([], Kind.INVALID_FIELD, "messages"),
        ([{"content": "x"}], Kind.INVALID_FIELD, "messages[0].role"),
        ([{"role": "user", "content": 3}], Kind.INVALID_FIELD, "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], Kind.INVALID_FIELD, "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], Kind.INVALID_FIELD, "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            Kind.UNSUPPORTED_FIELD,
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_is_no_text_is_refused_by_its_path(messages: list[Any], kind: Kind, param: str) -> None:
    with pytest.raises(PenstockError) as caught:
        normalise(messages)
    assert (caught.value.kind, caught.value.param) == (kind, param)


def test_the_clients_messages_are_left_alone() -> None:
    sent = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}]},
        {"role": "system", "content": "b"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    before = copy.deepcopy(sent)
    join_turns(normalise(sent))
    assert sent == before


def test_mends_join_or_relabel_turns_where_they_stand() -> None:
    def turns(text: str) -> list[dict[str, Any]]:
        roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
        return [{"role": roles[letter], "content": f"{letter}{n}"} for n, letter in enumerate(text)]

    def short(messages: list[dict[str, Any]]) -> list[str]:
        return [f"{message['role'][0]}:{message['content']}" for message in messages]

    tag = "<system>\n{}\n</system>".format
    assert short(tag_late_systems(turns("ssua"))) == ["s:s0\n\ns1", "u:u2", "a:a3"]
    assert short(tag_late_systems(turns("usa"))) == ["u:u0", f"u:{tag('s1')}", "a:a2"]
    assert short(join_turns(turns("suuas"))) == ["u:s0\n\nu1\n\nu2", "a:a3", f"u:{tag('s4')}"]
    assert short(join_turns(turns("uats"))) == ["u:u0", "a:a1", f"t:t2\n\n{tag('s3')}"]
