"""/tokenize and /detokenize over real sockets: llama.cpp's shape, vLLM's, and a chat's prompt."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import tokenizers
from tests.support.fake_backend import BOS, BOS_ID, CONTEXT, EOS_ID, VOCAB, Server, serving, text_parts

from penstock.api import tokens

TALK = [{"role": "user", "content": "hé"}]


def post(server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json=body)


@pytest.mark.parametrize("field", ["content", "prompt"])
@pytest.mark.parametrize("text", ["", "hé <|im_end|>", "\u200d👩‍👧 \x00"])
def test_a_text_becomes_ids_and_comes_back(field: str, text: str) -> None:
    with serving() as server:
        there = post(server, "/tokenize", {field: text}).json()
        back = post(server, "/detokenize", {"tokens": there["tokens"]}).json()
        assert not server.backend.runs
    assert there.keys() == {"tokens", "count", "max_model_len"}
    assert there["count"] == len(there["tokens"]) >= len(text) - len("<|im_end|>")
    assert back == {"content": text, "prompt": text}
    assert (EOS_ID in there["tokens"]) == ("<|im_end|>" in text)


def test_a_chat_becomes_the_prompt_that_the_chat_endpoint_computes() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    body = {
        "messages": TALK,
        "tools": [tool, {"type": "web_search"}],
        "chat_template_kwargs": {"thinking": 1},
    }
    with serving() as server:
        told = post(server, "/tokenize", body).json()
        assert post(server, "/v1/chat/completions", body).status_code == 200
        assert told["tokens"] == list(server.backend.runs[0].job.prompt)
        open_end = post(server, "/tokenize", {**body, "add_generation_prompt": False}).json()
    assert told["max_model_len"] == CONTEXT
    assert open_end["count"] <= told["count"]


def test_special_tokens_are_added_where_each_server_adds_them() -> None:
    text = text_parts()
    text.tokenizer._backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    plain, begun = [ord("x")], [BOS_ID, ord("x")]
    with serving(text=text) as server:
        for body, ids in (
            ({"content": "x"}, plain),
            ({"content": "x", "add_special": True}, begun),
            ({"prompt": "x"}, begun),
            ({"prompt": "x", "add_special_tokens": False}, plain),
        ):
            assert post(server, "/tokenize", body).json()["tokens"] == ids


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "content"),
        ("/tokenize", {"content": 3}, "content"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content[0].type"),
        ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"content": "a", "parse_special": False}, "parse_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [VOCAB]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**40]}, "tokens[0]"),
    ],
)  # fmt: skip
def test_what_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    with serving() as server:
        answer = post(server, path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_both_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_IDS", 100)
    with serving() as server:
        assert post(server, "/tokenize", {"content": "x" * 100}).status_code == 200
        refused = post(server, "/tokenize", {"prompt": "x" * 101})
        too_many = post(server, "/detokenize", {"tokens": [1] * ((1 << 20) + 1)})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "tokens")


def test_both_are_answered_while_the_engine_is_away() -> None:
    with serving() as server:
        server.on_loop(lambda: server.backend.become("restarting"))
        told = post(server, "/tokenize", {"content": "ab"}).json()
        said = post(server, "/detokenize", {"tokens": told["tokens"]}).json()
    assert (told["max_model_len"], said["content"]) == (None, "ab")
