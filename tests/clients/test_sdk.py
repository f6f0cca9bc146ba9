"""The real `openai` package against the whole program, its engine scripted."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from tests.support.serve_scripted import ScriptedServer

TOOL = {
    "type": "function",
    "function": {
        "name": "read",
        "description": "Reads a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}
CALL = ["<tool_call>", '\n{"name": "read", "arguments": {"path": "a b.txt"}}\n', "</tool_call>"]


def chat(client: openai.OpenAI, content: str = "hello", **more: Any) -> Any:
    return client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": content}], **more
    )


def texts(stream: Any) -> list[str]:
    return [c.delta.content for chunk in stream for c in chunk.choices if c.delta.content]


def test_chat(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "hello", "pieces": ["Good", " morning", "."]})
    answer = chat(client)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == ("Good morning.", "assistant")
    assert (choice.finish_reason, choice.index, answer.object) == ("stop", 0, "chat.completion")
    assert answer.usage.prompt_tokens == server.events("submit")[-1]["prompt"]
    assert answer.usage.completion_tokens == server.events("finished")[-1]["sent"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_stream_has_one_id_a_role_first_and_usage_once_at_the_end(
    client: openai.OpenAI, server: ScriptedServer
) -> None:
    server.rules({"when": "", "pieces": ["one ", "two ", "three"], "step": 0.01})
    with chat(client, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == "one two three"
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert reasons == ["stop"]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []


def test_stream_opens_before_prefill_and_keeps_talking(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["ready"], "prefill": 1.0})
    joined = len(server.events("joined"))
    with chat(client, stream=True) as stream:
        first = next(stream)
        assert len(server.events("joined")) == joined
        rest = list(stream)
    assert first.choices[0].delta.role == "assistant"
    silent = [chunk for chunk in rest if chunk.choices and not chunk.choices[0].delta.content]
    assert len(silent) >= 3
    assert {chunk.id for chunk in rest} == {first.id}


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_and_its_result(client: openai.OpenAI, server: ScriptedServer, stream: bool) -> None:
    server.rules(
        {"when": "<tool_response>\nBlue.\n</tool_response>", "pieces": ["It is blue."]},
        {"when": '"name": "read"', "pieces": ["Let me look.\n", *CALL]},
    )
    messages: list[Any] = [{"role": "user", "content": "Which colour?"}]
    if stream:
        with client.chat.completions.stream(model="any", messages=messages, tools=[TOOL]) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(model="any", messages=messages, tools=[TOOL])
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.type, call.function.name) == ("function", "read")
    assert json.loads(call.function.arguments) == {"path": "a b.txt"}
    assert choice.message.content.strip() == "Let me look."
    messages += [
        {"role": "assistant", "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
        {"role": "tool", "tool_call_id": call.id, "content": "Blue."},
    ]
    second = client.chat.completions.create(model="any", messages=messages, tools=[TOOL])
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It is blue.", "stop")


def test_a_call_that_cannot_be_parsed_comes_as_text(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["<tool_call>", '\n{"name": "read", "argu', "</tool_call>"]})
    (choice,) = chat(client, tools=[TOOL]).choices
    assert not choice.message.tool_calls
    assert '{"name": "read", "argu' in choice.message.content
    assert choice.finish_reason == "stop"


def test_reasoning_is_apart(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["<think>", "Hm.", "</think>", "Yes."]})
    message = chat(client).choices[0].message
    assert message.content.strip() == "Yes."
    assert message.reasoning_content.strip() == message.reasoning.strip() == "Hm."


def test_completions_of_a_string_of_strings_and_of_ids(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "first", "pieces": ["1st"]}, {"when": "second", "pieces": ["2nd"]})
    one = client.completions.create(model="any", prompt="the first")
    assert (one.choices[0].text, one.choices[0].finish_reason) == ("1st", "stop")
    assert one.object == "text_completion"
    two = client.completions.create(model="any", prompt=["the first", "the second"])
    assert [(c.index, c.text) for c in two.choices] == [(0, "1st"), (1, "2nd")]
    ids = client.completions.create(model="any", prompt=[70, 71, 72])
    assert (ids.usage.prompt_tokens, ids.choices[0].text) == (3, "fine")
    with client.completions.create(model="any", prompt="the second", stream=True) as stream:
        assert "".join(c.text for chunk in stream for c in chunk.choices) == "2nd"


def test_logprobs_spell_the_answer(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["a", "é", "b"]})
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    entries = choice.logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode().startswith("aéb")
    assert choice.message.content == "aéb"
    assert entries[0].token == "a"
    assert [len(entry.top_logprobs) for entry in entries] == [3] * len(entries)
    assert all(entry.logprob == entry.top_logprobs[0].logprob == -0.25 for entry in entries)
    text = client.completions.create(model="any", prompt="x", logprobs=2).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == len(text.top_logprobs)
    assert text.token_logprobs[0] == -0.25


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(client: openai.OpenAI, server: ScriptedServer, stream: bool) -> None:
    server.rules({"when": "", "pieces": ["same"]})
    before = len(server.events("submit"))
    answers = {0: "", 1: "", 2: ""}
    if stream:
        with chat(client, n=3, stream=True) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    answers[choice.index] += choice.delta.content or ""
    else:
        answers |= {c.index: c.message.content for c in chat(client, n=3).choices}
    assert answers == {0: "same", 1: "same", 2: "same"}
    assert sorted(event["choice"] for event in server.events("submit")[before:]) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_three_tokens(client: openai.OpenAI, server: ScriptedServer, stream: bool) -> None:
    # One id each: x A | B C | D E ... with step time, so that they also arrive in steps of their own.
    pieces = ["x", " ab", " cd", " ef", *[" gh"] * 500]  # it does not end by itself before it is told to
    server.rules({"when": "", "pieces": pieces, "step": 0.02, "reason": "length"})
    stop = ["b cd e"]
    if stream:
        with chat(client, stop=stop, stream=True, stream_options={"include_usage": True}) as chunks:
            found = list(chunks)
        text = "".join(c.delta.content or "" for chunk in found for c in chunk.choices)
        (reason,) = [c.finish_reason for chunk in found for c in chunk.choices if c.finish_reason]
        usage = found[-1].usage
    else:
        answer = chat(client, stop=stop)
        text, reason, usage = answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage
    assert (text, reason, usage.completion_tokens) == ("x a", "stop", 4)
    submitted = server.events("submit")[-1]
    end = server.until(lambda: [e for e in server.events("end") if e["id"] == submitted["id"]])[-1]
    assert end["keep"] == submitted["prompt"] + 4


def test_a_stop_string_that_only_begins_is_given_back(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["x", " ab", " cd", "!"]})
    assert chat(client, stop="b cd e").choices[0].message.content == "x ab cd!"


def test_characters_over_several_tokens_are_whole(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["né ", "€", "😀", "!"], "step": 0.01})
    with chat(client, stream=True) as stream:
        parts = texts(stream)
    assert "".join(parts) == "né €😀!"
    assert not any("\ufffd" in part for part in parts)
    assert server.events("finished")[-1]["sent"] > len("né €😀!")


def test_length(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["x", " ab", " cd"], "step": 0.01})
    answer = chat(client, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == ("x ab", 2)


def test_an_empty_prompt(client: openai.OpenAI, server: ScriptedServer) -> None:
    assert chat(client, "").choices[0].message.content == "fine"
    empty = client.completions.create(model="any", prompt="")
    assert (empty.choices[0].text, empty.usage.prompt_tokens) == ("fine", 1)
    with pytest.raises(openai.BadRequestError) as none:
        client.chat.completions.create(model="any", messages=[])
    assert none.value.param == "messages"


def test_a_prompt_longer_than_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, " ab" * 140_000)
    assert refused.value.code == "context_length_exceeded"
    assert "131072" in refused.value.message.replace(",", "")
    assert "140" in refused.value.message


def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI) -> None:
    form: Any = {"type": "grammar"}
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, response_format=form)
    assert (refused.value.param, refused.value.code) == ("response_format.type", "invalid_value")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="any", prompt="x", suffix="y")
    assert refused.value.param == "suffix"
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, "refuse this")
    assert refused.value.code == "chat_template_error"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="x")


def test_an_engine_error_is_an_error_before_and_inside_a_stream(
    client: openai.OpenAI, server: ScriptedServer
) -> None:
    server.rules({"when": "", "pieces": ["half"], "reason": "error"})
    with pytest.raises(openai.InternalServerError) as failed:
        chat(client)
    assert failed.value.code == "out_of_memory"
    assert "context" not in failed.value.message
    with chat(client, stream=True) as stream, pytest.raises(openai.APIError) as late:
        list(stream)
    assert late.value.code == "out_of_memory"


def test_models_and_any_name(client: openai.OpenAI, server: ScriptedServer) -> None:
    (model,) = client.models.list().data
    assert (model.object, bool(model.id), bool(model.owned_by)) == ("model", True, True)
    assert client.models.retrieve(model.id).id == model.id
    assert chat(client).model == model.id


def test_a_timeout_ends_the_row(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "", "pieces": ["never"], "prefill": 60})
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.5))
    last = server.events("submit")[-1]["id"]
    server.until(lambda: any(event["id"] == last for event in server.events("end")))


def test_a_death_is_survived_or_said(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.rules({"when": "poison", "die": True, "pieces": ["x"]}, {"when": "", "pieces": ["alive"]})
    with pytest.raises(openai.InternalServerError) as failed:
        chat(client.with_options(timeout=60), "poison")
    assert failed.value.code == "engine_died"
    assert chat(client.with_options(timeout=60)).choices[0].message.content == "alive"
