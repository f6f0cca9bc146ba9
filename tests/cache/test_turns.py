"""What a turn computes: real templates and tokenizers, 20 turns from 500 to 16,000 ids, counted in the tree.

Nothing is computed here. A turn's new ids are those that no earlier prompt or answer has at their place; the
rest must come from the cache, but for 64.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support import chat_templates, tiny_tokenizers
from tests.support.agent_traffic import STATE, Request, serve

from penstock.cache.tree import Tree
from penstock.text import borders
from penstock.text.parts import TextParts

TURNS = 20
SLACK = 64
TEMPLATES = {
    "stripped": chat_templates.QWEN,
    "kept": chat_templates.QWEN.replace("loop.index0 > ns.last", "true"),
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
WORDS = "the quick brown fox jumps over a lazy dog while nobody minded it was fine day".split()


@pytest.fixture(scope="module", params=TEMPLATES)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextParts:
    folder: Path = tmp_path_factory.mktemp(request.param)
    config = {"chat_template": TEMPLATES[request.param], "eos_token": "<|im_end|>"}
    return TextParts.load(tiny_tokenizers.write_model(folder, tiny_tokenizers.byte_level(), config))


class Chat:
    """A conversation through a template: what each turn sends, and what it is answered."""

    def __init__(self, parts: TextParts, ends_in: str) -> None:
        self.parts, self.ends_in = parts, ends_in
        self.draw = random.Random(5)
        self.source = parts.template.source or ""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.words(150)}]
        self.render = partial(parts.template.render, tools=[TOOL], kwargs=None, role_mapping=None)

    def words(self, count: int) -> str:
        return " ".join(self.draw.choices(WORDS, k=count))

    def encode(self, text: str) -> Any:
        return self.parts.tokenizer.encode(text, add_special_tokens=False)

    def turn(self, number: int) -> Request:
        """The next message, and the model's answer: with a call where a tool is to speak next."""
        calls = self.ends_in == "tool" and number % 5 != 4
        if self.messages[-1].get("tool_calls"):
            self.messages.append({"role": "tool", "tool_call_id": "a", "content": self.words(540)})
        else:
            self.messages.append({"role": "user", "content": self.words(130 if number == 0 else 560)})
        prompt = self.render(self.messages)
        ids = self.encode(prompt)
        edges, turn = borders.found(
            ids, prompt, self.parts.markers, self.parts.tokenizer, self.messages, self.render
        )
        answer: dict[str, Any] = {"role": "assistant", "content": self.words(60)}
        answer["reasoning_content"] = self.words(60)
        if calls:
            answer["tool_calls"] = [{"id": "a", "function": {"name": "look", "arguments": {"at": "it"}}}]
        self.messages.append(answer)
        whole = self.parts.template.render(self.messages, [TOOL], False, None)
        assert whole.startswith(prompt)
        return Request(ids, self.encode(whole[len(prompt) :].rstrip()), edges, turn)  # type: ignore[arg-type]


@pytest.mark.parametrize("ends_in", ["user", "tool"])
def test_a_turn_computes_its_new_ids_and_little_more(parts: TextParts, ends_in: str) -> None:
    chat, dense, hybrid = Chat(parts, ends_in), Tree(), Tree(True, STATE)
    lengths, longest, most = [], 0, 0
    for number in range(TURNS):
        request = chat.turn(number)
        match = hybrid.match("", request.prompt[:-1])
        assert dense.match("", request.prompt[:-1]).usable == match.length
        if number:
            longest = max(longest, len(request.prompt) - match.length)
            most = max(most, match.length - match.usable)
        lengths.append(len(request.prompt))
        for tree in (dense, hybrid):
            serve([request], tree)
    print(f"{lengths[0]} to {lengths[-1]} ids, {longest} new at most; {most} computed beyond what is new")
    assert most <= SLACK
    assert lengths[0] <= 700
    assert 15_000 <= lengths[-1] <= 20_000
    # Where thoughts are stripped, a user's turn changes all since the user's turn before.
    assert longest <= (1_000 if ends_in == "user" or "> ns.last" not in chat.source else 4_500)
