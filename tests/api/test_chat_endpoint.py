"""/v1/chat/completions over real sockets, the engine scripted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tests.support.fake_backend import EOS_ID, Server, fail, say, serving, text_parts

from penstock.config import Options
from penstock.errors import Kind
from penstock.text.template import ChatTemplate

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}
THINK, END_THINK, CALL, END_CALL = [259], [260], [261], [262]


def ask(server: Server, content: Any = "hi", **fields: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(CHAT, json={"messages": [{"role": "user", "content": content}], **fields})


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, [DONE] as a string."""
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def deltas(chunks: list[Any], index: int = 0) -> list[dict[str, Any]]:
    return [c["delta"] for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == index]


def test_whole_answer() -> None:
    with serving(say("Hel", "lo")) as server:
        response = ask(server)
        body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "org/fake"
    assert response.headers["x-request-id"] in body["id"]
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = len(server.backend.runs[0].job.prompt)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 6,
        "total_tokens": prompt + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_stream_order_ids_and_usage() -> None:
    with serving(say("Hel", "lo")) as server:
        response = ask(server, stream=True, stream_options={"include_usage": True})
    chunks = events(response)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["transfer-encoding"] == "chunked"
    assert chunks[-1] == "[DONE]"
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert {chunk["object"] for chunk in chunks[:-1]} == {"chat.completion.chunk"}
    assert deltas(chunks) == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["usage"] is None for chunk in chunks[:-1]] == [True] * 4 + [False]
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("options", [{}, None, {"include_usage": None}, {"include_usage": False}])
def test_no_usage_unless_asked_for(options: Any) -> None:
    with serving() as server:
        chunks = events(ask(server, stream=True, stream_options=options))
    assert chunks[-1] == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_prompt_progress() -> None:
    with serving() as server:
        chunks = events(ask(server, stream=True, return_progress=True))
    told = [chunk["prompt_progress"] for chunk in chunks[:-1] if "prompt_progress" in chunk]
    total = len(server.backend.runs[0].job.prompt)
    assert [(t["total"], t["cache"], t["processed"]) for t in told] == [(total, 0, total // 2)]
    assert told[0]["time_ms"] >= 0


def test_reasoning_under_both_names() -> None:
    script = say(THINK, "why", END_THINK, "because")
    with serving(script) as server:
        message = ask(server).json()["choices"][0]["message"]
        streamed = deltas(events(ask(server, stream=True)))
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == (
        "why",
        "why",
        "because",
    )
    assert {"reasoning_content": "why", "reasoning": "why"} in streamed
    assert {"content": "because"} in streamed


def test_a_template_that_opens_the_reasoning() -> None:
    with serving(say("why", END_THINK, "because")) as server:
        message = ask(server, chat_template_kwargs={"thinking": True}).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("why", "because")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "-"),
        ({"reasoning_effort": "high"}, "high-"),
        ({"reasoning_effort": "none"}, "-False"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low"}}, "low-"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "-True"),
    ],
)
def test_effort_reaches_the_template(fields: dict[str, Any], told: str) -> None:
    template = ChatTemplate({"default": "{{ reasoning_effort }}-{{ enable_thinking }}"})
    with serving(say("ok"), text=replace(text_parts(), template=template)) as server:
        assert ask(server, **fields).is_success
        with server.client() as client:
            body = {"messages": [{"role": "user", "content": "hi"}], **fields}
            tokens = client.post("/tokenize", json=body).json()["tokens"]
        prompt = list(server.backend.runs[0].job.prompt)
        assert ask(server, reasoning_effort=1).json()["error"]["param"] == "reasoning_effort"
    assert prompt == tokens == list(told.encode())


def test_tool_calls_whole_and_streamed() -> None:
    script = say(CALL, '{"name": "read", "arguments": {"path": "a"}}', END_CALL)
    with serving(script) as server:
        choice = ask(server, tools=[TOOL]).json()["choices"][0]
        chunks = events(ask(server, tools=[TOOL], stream=True))
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert (call["type"], call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "function",
        "read",
        {"path": "a"},
    )
    (streamed,) = next(delta["tool_calls"] for delta in deltas(chunks) if "tool_calls" in delta)
    assert streamed["index"] == 0
    assert streamed["id"] != call["id"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_reach_the_template_unless_the_choice_is_none() -> None:
    other = {"type": "web_search"}
    with serving() as server:
        for more in ({"tools": [TOOL, other]}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": [other]}):
            assert ask(server, **more).status_code == 200
        prompts = [bytes(id for id in run.job.prompt if id < 256) for run in server.backend.runs]
    assert [b"[1 tools]" in prompt for prompt in prompts] == [True, False, False]


def test_n_choices_each_with_its_role() -> None:
    with serving(say("a", "b")) as server:
        body = ask(server, n=3).json()
        chunks = events(ask(server, n=3, stream=True))
    assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [
        (0, "ab"),
        (1, "ab"),
        (2, "ab"),
    ]
    assert body["usage"]["completion_tokens"] == 9
    for index in range(3):
        assert deltas(chunks, index)[0] == {"role": "assistant", "content": ""}
    assert [c["finish_reason"] for chunk in chunks[:-1] for c in chunk["choices"]].count("stop") == 3


def test_stop_string_over_three_events_ends_the_sequence_in_the_engine() -> None:
    with serving(say("one E", "N", "D two", forever=True)) as server:
        body = ask(server, stop=["END"]).json()
        (run,) = server.backend.runs
    assert body["choices"][0]["message"]["content"] == "one "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 7
    assert run.ended == {0: len(run.job.prompt) + 7}


def test_characters_split_between_events_are_never_torn() -> None:
    smile = "é😀".encode()
    with serving(say(*([byte] for byte in smile))) as server:
        streamed = deltas(events(ask(server, stream=True)))
    assert "".join(delta.get("content", "") for delta in streamed) == "é😀"
    assert not any("\ufffd" in delta.get("content", "") for delta in streamed)


def test_length() -> None:
    with serving(say("abc", "def")) as server:
        choice = ask(server, max_tokens=9, max_completion_tokens=4).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abcd", "length")


def test_logprobs() -> None:
    with serving(say("ab")) as server:
        whole = ask(server, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
        bare = ask(server, logprobs=True).json()["choices"][0]["logprobs"]
        implied = ask(server, top_logprobs=1).json()["choices"][0]["logprobs"]
        chunks = events(ask(server, logprobs=True, stream=True))
    first = whole["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
    assert first["top_logprobs"] == [
        {"token": "a", "logprob": -0.5, "bytes": [97]},
        {"token": "z", "logprob": -2.0, "bytes": [122]},
    ]
    assert bare["content"][0]["top_logprobs"] == []
    assert len(implied["content"][0]["top_logprobs"]) == 1
    streamed = [c["logprobs"] for chunk in chunks[:-1] for c in chunk["choices"] if c["logprobs"]]
    assert [entry["token"] for part in streamed for entry in part["content"]][:2] == ["a", "b"]


def test_fields_reach_the_engine() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "xtc_probability": 1,
        "xtc_threshold": 0.2,
        "repetition_penalty": 1.1,
        "repetition_context_size": 30,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "logit_bias": {"5": -100},
    }
    with serving() as server:
        assert ask(server, seed=0, min_tokens=3, ignore_eos=True, **fields).status_code == 200
        job = server.backend.runs[0].job
    assert {name: getattr(job.sampling, name) for name in fields} == fields | {"logit_bias": {5: -100.0}}
    assert (job.seed, job.min_tokens, job.ignore_eos, job.max_tokens) == (0, 3, True, None)


def test_failure_before_the_first_byte_is_a_status() -> None:
    with serving(fail(Kind.OUT_OF_MEMORY, "No memory.")) as server:
        response = ask(server)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "out_of_memory"
    assert response.headers["retry-after"] == "1"


def test_failure_in_a_stream_is_an_error_event_and_no_done() -> None:
    with serving(fail(Kind.ENGINE_DIED, "The engine died.", after="some")) as server:
        response = ask(server, stream=True)
        chunks = events(response)
    assert response.status_code == 200
    assert "[DONE]" not in chunks
    assert chunks[-1] == {
        "error": {"message": "The engine died.", "type": "server_error", "param": None, "code": "engine_died"}
    }
    assert {"content": "some"} in deltas(chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_an_internal_error_without_its_words(
    stream: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.text.assembler.Assembler.feed", lambda *_: 1 / 0)
    with serving() as server:
        response = ask(server, stream=stream)
        monkeypatch.undo()
        assert ask(server).status_code == 200
    assert "ZeroDivision" not in response.text
    assert '"internal_error"' in response.text
    assert response.status_code == (200 if stream else 500)
    assert "ZeroDivisionError" in caplog.text


def test_too_long_names_both_numbers_and_sends_no_stream() -> None:
    with serving() as server:
        response = ask(server, "x" * 5000, stream=True)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 4096 tokens" in error["message"]
    assert "5019 tokens" in error["message"]
    assert server.backend.runs == []


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_not_text_are_refused_by_name(kind: str) -> None:
    with serving() as server:
        response = ask(server, [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "http://x"}}])
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == "messages[0].content[1].type"


def test_strict_model_names() -> None:
    with serving(options=Options(port=0, strict_model_names=True)) as server:
        assert ask(server, model="alias").status_code == 200
        refused = ask(server, model="gpt-4")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    with serving() as server:
        assert ask(server, model="gpt-4").json()["model"] == "org/fake"


def test_large_bodies_and_developer_messages() -> None:
    messages = [{"role": "developer", "content": "x" * 300}] * 2 + [{"role": "user", "content": "hi"}]
    with serving() as server, server.client() as client:
        body = {"messages": messages, "metadata": {"padding": "y" * 400_000}}
        assert client.post(CHAT + "?beta=true", json=body).status_code == 200
        prompt = bytes(id for id in server.backend.runs[0].job.prompt if id < 256)
    assert prompt.count(b"x" * 300) == 2


def test_eos_alone_is_an_empty_answer() -> None:
    with serving(say([EOS_ID], reason="stop"), text=text_parts()) as server:
        assert ask(server).json()["choices"][0]["message"]["content"] == ""
