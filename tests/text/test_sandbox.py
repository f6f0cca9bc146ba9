"""Templates that explode: they end, in bounded time and size, as a refusal; other threads' go on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from tests.support import tiny_tokenizers
from transformers import PreTrainedTokenizerFast

from penstock.errors import Kind, PenstockError
from penstock.models import DEMO
from penstock.text import sandbox
from penstock.text.template import ChatTemplate

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}


def refused(source: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    with pytest.raises(PenstockError) as caught:
        ChatTemplate({"default": source}).render(messages, None, kwargs=kwargs)
    assert caught.value.kind is Kind.TEMPLATE
    return caught.value.message


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% set x = 1 %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% set b = messages | selectattr('content', 'equalto', a.content) | list %}"
        "{% endfor %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro two(n) %}{% if n %}{{ two(n - 1) }}{{ two(n - 1) }}{% endif %}{% endmacro %}{{ two(60) }}",
        "{% for n in [60] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}{% endif %}{% endfor %}",
        "{% for a in range(99999) if a < 0 %}{% else %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
    ],
)
def test_time_is_bounded(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    assert "longer than 0.2 s" in refused(endless, [USER] * 2000)


@pytest.mark.parametrize(
    "growing",
    [
        "{% set s = namespace(t='ab') %}{% for i in range(60) %}{% set s.t = s.t + s.t %}{% endfor %}",
        "{% set s = namespace(t='ab') %}{% for i in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}",
        "{% set s = namespace(t=[1]) %}{% for i in range(60) %}{% set s.t = s.t + s.t %}{% endfor %}",
        "{% macro d(t) %}{{ t }}{{ t }}{% endmacro %}"
        "{% set s = namespace(t='ab') %}{% for i in range(60) %}{% set s.t = d(s.t) %}{% endfor %}",
        "{% set s = namespace(t='ab') %}{% for i in range(60) %}"
        "{% set x %}{{ s.t }}{{ s.t }}{% endset %}{% set s.t = x %}{% endfor %}",
        "{% set s = namespace(t='ab') %}{% for i in range(60) %}"
        "{% set s.t = s.t.replace('a', 'aa').replace('b', 'bb') %}{% endfor %}",
        "{% set s = namespace(t='ab') %}{% for i in range(60) %}"
        "{% set s.t = s.t | replace('a', 'aa') | replace('b', 'bb') %}{% endfor %}",
        "{{ (('%' + width + 'd') % 1) | length }}",
        "{{ 'x'.ljust(width | int) | length }}",
        "{{ 'x' | center(width | int) | length }}",
    ],
)
def test_size_is_bounded(growing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDERED", 1 << 16)
    assert "too large" in refused(growing, [USER], width="100000")


def test_a_template_that_ran_out_of_time_takes_nothing_from_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for a in range(slow) %}{% for b in range(99999) %}{% endfor %}{% endfor %}ok"
    template = ChatTemplate({"default": source})
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    answers: list[str] = []

    def quick() -> None:
        answers.extend(template.render([USER], None, kwargs={"slow": 0}) for _ in range(50))

    thread = threading.Thread(target=quick)
    thread.start()
    with pytest.raises(PenstockError, match="longer than"):
        template.render([USER], None, kwargs={"slow": 99999})
    thread.join()
    assert answers == ["ok"] * 50
    assert template.render([USER], None, kwargs={"slow": 0}) == "ok"


def test_what_is_watched_renders_as_it_did() -> None:
    """The demo model's template, and one with all that the sandbox puts its hands on, as in transformers."""
    woven = (
        "{% macro both(a, b) %}{{ a }}-{{ b }}{% endmacro %}{% set kept %}{{ messages | length }}{% endset %}"
        "{% for m in messages if m.role != 'x' %}{{ loop.index ~ ':' ~ m.role ~ none }}"
        "{{ both(m.content, kept) | upper }}{% else %}nobody{% endfor %}{{ '%s!' % kept + 'a' * 2 }}"
        "{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is sequence else x + 1 }}{% endfor %}"
    )
    talk = [USER, {"role": "assistant", "content": "<think>t</think>x", "tool_calls": [CALL]},
            {"role": "tool", "content": "42"}, USER]  # fmt: skip
    for source in ((DEMO / "chat_template.jinja").read_text(), woven):
        theirs = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.byte_level(), chat_template=source)
        wanted = theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        assert ChatTemplate({"default": source}).render(talk, None) == wanted
