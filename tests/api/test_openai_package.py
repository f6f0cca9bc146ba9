"""The real `openai` package against the real application, the engine scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.support.fake_backend import Script, Server, fail, say, serving

from penstock.errors import Kind

USER: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(verify=False, trust_env=False) as transport,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=transport) as made,
    ):
        yield made


def play(server: Server, script: Script) -> None:
    server.backend.script = script


def test_chat(server: Server, client: openai.OpenAI) -> None:
    play(server, say("Hello"))
    answer = client.chat.completions.create(model="any", messages=USER)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer._request_id is not None
    assert answer._request_id in answer.id


def test_stream_accumulates(server: Server, client: openai.OpenAI) -> None:
    play(server, say([259], "why", [260], "be", "cause", [261], '{"name": "read", "arguments": {}}', [262]))
    with client.chat.completions.stream(
        model="any", messages=USER, tools=TOOLS, stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    (choice,) = final.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "because"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.name == "read"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {}
    assert choice.finish_reason == "tool_calls"
    assert final.usage is not None
    assert choice.message.model_extra is not None
    assert choice.message.model_extra["reasoning_content"] == "why"


def test_a_tool_result_goes_back(server: Server, client: openai.OpenAI) -> None:
    play(server, say([261], '{"name": "read", "arguments": {"path": "a"}}', [262]))
    message = client.chat.completions.create(model="any", messages=USER, tools=TOOLS).choices[0].message
    assert message.tool_calls is not None
    play(server, say("done"))
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "text"}
    history: Any = [*USER, message, result]
    assert client.chat.completions.create(model="any", messages=history).choices[0].message.content == "done"


def test_completions_logprobs_n_stop(server: Server, client: openai.OpenAI) -> None:
    play(server, say("abc", "STOP", "d"))
    answer = client.completions.create(model="any", prompt=["a", "b"], n=2, stop=["STOP"], logprobs=1)
    assert [choice.text for choice in answer.choices] == ["abc"] * 4
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert answer.choices[0].logprobs.tokens[:3] == ["a", "b", "c"]
    streamed = client.completions.create(model="any", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "abcSTOPd"


def test_chat_logprobs(server: Server, client: openai.OpenAI) -> None:
    play(server, say("ab"))
    answer = client.chat.completions.create(model="any", messages=USER, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert [entry.token for entry in answer.choices[0].logprobs.content[:2]] == ["a", "b"]
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].token == "z"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["org/fake", "alias"]
    assert client.models.retrieve("org/fake").owned_by == "penstock"


def test_errors(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="any", messages=USER, n=99)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "n",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="any", prompt="x" * 9000)
    assert long.value.code == "context_length_exceeded"
    play(server, fail(Kind.ENGINE_DIED, "The engine died.", after="some"))
    with pytest.raises(openai.APIError, match="The engine died") as late:
        list(client.chat.completions.create(model="any", messages=USER, stream=True))
    assert late.value.code == "engine_died"


def test_a_timeout_ends_the_job(server: Server, client: openai.OpenAI) -> None:
    async def silent(run: Any) -> None:
        await asyncio.sleep(0)

    play(server, silent)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model="any", messages=USER)


def test_a_passing_failure_is_retried(server: Server, client: openai.OpenAI) -> None:
    failing = fail(Kind.BUSY, "Busy.")

    async def first_fails(run: Any) -> None:
        play(server, say("second"))
        await failing(run)

    play(server, first_fails)
    answer = client.with_options(max_retries=1).chat.completions.create(model="any", messages=USER)
    assert answer.choices[0].message.content == "second"


def test_calls_stream_as_they_are_written(server: Server, client: openai.OpenAI) -> None:
    inner = '{"name": "read", "arguments": {"path": "abcdefgh"}}'
    play(server, say([261], *inner, [262]))
    with client.chat.completions.stream(model="any", messages=USER, tools=TOOLS) as stream:
        events = [event.type for event in stream]
        choice = stream.get_final_completion().choices[0]
    assert events.count("tool_calls.function.arguments.delta") > 5
    (call,) = choice.message.tool_calls or []
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "read")  # type: ignore[union-attr]
    assert json.loads(call.function.arguments) == {"path": "abcdefgh"}  # type: ignore[union-attr]


def test_a_cut_call_ends_with_length(server: Server, client: openai.OpenAI) -> None:
    inner = '{"name": "read", "arguments": {"path": "abcdefgh"}}'
    for most in (10, 40, len(inner)):
        play(server, say([261], *inner, [262]))
        chunks = client.chat.completions.create(
            model="any", messages=USER, tools=TOOLS, max_tokens=most, stream=True
        )
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_one_call_where_parallel_ones_are_not_wanted(server: Server, client: openai.OpenAI) -> None:
    inner = '{"name": "read", "arguments": {}}'
    play(server, say([261], *inner, [262], [261], *inner, [262], "more"))
    answer = client.chat.completions.create(
        model="any", messages=USER, tools=TOOLS, parallel_tool_calls=False
    ).choices[0]
    assert (answer.finish_reason, len(answer.message.tool_calls or [])) == ("tool_calls", 1)
    assert server.backend.runs[-1].ended == {0: len(server.backend.runs[-1].job.prompt) + len(inner) + 2}
