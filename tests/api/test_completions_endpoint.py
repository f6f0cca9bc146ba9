"""/v1/completions over real sockets, the engine scripted."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tests.support.fake_backend import BOS_ID, EOS_ID, Run, Server, fail, say, serving, text_parts

from penstock.errors import Kind


def complete(server: Server, prompt: Any, **fields: Any) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/completions", json={"prompt": prompt, **fields})


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
        ("", [[BOS_ID]]),
        ([""], [[BOS_ID]]),
    ],
)
def test_every_form_of_prompt(prompt: Any, ids: list[list[int]]) -> None:
    with serving(say("x")) as server:
        body = complete(server, prompt).json()
        assert [list(run.job.prompt) for run in server.backend.runs] == ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(ids)))
    assert [choice["text"] for choice in body["choices"]] == ["x"] * len(ids)
    assert body["object"] == "text_completion"
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_an_empty_prompt_without_bos_starts_with_eos_or_is_refused() -> None:
    with serving(text=text_parts(bos=False)) as server:
        assert complete(server, "").status_code == 200
        assert list(server.backend.runs[0].job.prompt) == [EOS_ID]
    with serving(text=text_parts(bos=False, eos=False)) as server:
        refused = complete(server, ["a", ""])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt[1]")


def test_many_prompts_with_n_number_choices_by_prompt() -> None:
    async def echo(run: Any) -> None:
        for choice in range(run.job.n):
            run.put(choice, [run.job.prompt[0], ord("0") + choice, EOS_ID])
            run.ended[choice] = None
            run.ticket.put_finished(choice, "stop", 3)

    with serving(echo) as server:
        body = complete(server, ["a", "b"], n=2).json()
        streamed = complete(server, ["a", "b"], n=2, stream=True).text
    assert [choice["text"] for choice in body["choices"]] == ["a0", "a1", "b0", "b1"]
    texts: dict[int, str] = {}
    for line in streamed.split("\n\n")[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "a0", 1: "a1", 2: "b0", 3: "b1"}


def test_marks_stay_in_the_text() -> None:
    with serving(say([259], "why", [260], " so")) as server:
        assert complete(server, "a").json()["choices"][0]["text"] == "<think>why</think> so"


def test_logprobs_in_the_completions_shape() -> None:
    with serving(say("ab", "c")) as server:
        whole = complete(server, "x", logprobs=2).json()["choices"][0]["logprobs"]
        zero = complete(server, "x", logprobs=0).json()["choices"][0]["logprobs"]
        flag = complete(server, "x", logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]
        none = complete(server, "x", logprobs=False).json()["choices"][0]["logprobs"]
    assert whole["tokens"][:3] == ["a", "b", "c"]
    assert whole["token_logprobs"][:3] == [-0.5] * 3
    assert whole["top_logprobs"][0] == {"a": -0.5, "z": -2.0}
    assert whole["text_offset"][:3] == [0, 1, 2]
    assert zero["top_logprobs"][0] == {}
    assert flag["top_logprobs"][0] == {"a": -0.5}
    assert none is None


def test_of_pieces_that_read_alike_the_likeliest_stays() -> None:
    async def script(run: Run) -> None:
        run.ticket.put_tokens(0, [0xC3], [-0.1], [[(0xC3, -0.1), (ord("a"), -2.0), (0xE2, -9.0)]])
        run.ended[0] = None
        run.ticket.put_finished(0, "stop", 1)

    with serving(script) as server:
        told = complete(server, "x", logprobs=3).json()["choices"][0]["logprobs"]
    assert told["top_logprobs"] == [{"\ufffd": -0.1, "a": -2.0}]


def test_stream_failure_of_one_prompt_is_an_error_event() -> None:
    with serving(fail(Kind.ENGINE_DIED, "The engine died.")) as server:
        text = complete(server, ["a", "b"], stream=True).text
    assert text.endswith("\n\n")
    assert '"engine_died"' in text.split("\n\n")[-2]
    assert "[DONE]" not in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 10**6]}, "prompt[1]"),
        ({"prompt": [[1], [2, -1]]}, "prompt[1][1]"),
        ({"prompt": [2**70]}, "prompt[0]"),
        ({"prompt": [["a"]]}, "prompt[0][0]"),
        ({"prompt": ["a"] * 9, "n": 16}, "prompt"),
        ({"prompt": ["a", "b" * 5000]}, "prompt[1]"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": "yes"}, "logprobs"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with serving() as server:
        response = complete(server, **fields)
        assert complete(server, "a", echo=False, suffix="", best_of=1).status_code == 200
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
