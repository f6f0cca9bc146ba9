"""/v1/responses over real sockets with the real `openai` package, the engine scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import Discriminator, TypeAdapter
from tests.support.fake_backend import Server, fail, say, serving, text_parts

from penstock.api.service import Timing
from penstock.errors import Kind
from penstock.text.template import ChatTemplate

TOOLS: Any = [
    {
        "type": "function",
        "name": "read",
        "description": "reads",
        "strict": False,
        "parameters": {"type": "object"},
    }
]
THINK, END_THINK, CALL, END_CALL = [259], [260], [261], [262]
READ = '{"name": "read", "arguments": {"path": "a"}}'
EVERYTHING = say(THINK, "h", "m", END_THINK, "S", "o.", CALL, READ, END_CALL)
TALK = (  # writes an answer as the script above does
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>{% endfor %}"
    "{{ reasoning_effort }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(text=replace(text_parts(), template=ChatTemplate({"default": TALK}))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(verify=False, trust_env=False) as transport,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=transport) as made,
    ):
        yield made


def prompt(server: Server) -> str:
    """The text of the last request's prompt."""
    tokenizer = text_parts().tokenizer
    return b"".join(tokenizer.token_bytes(id) for id in server.backend.runs[-1].job.prompt).decode()


def post(server: Server, **body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post("/v1/responses", json={"input": "hi", **body})


def refused(server: Server, **body: Any) -> tuple[str, str]:
    """The field at fault and the message."""
    answer = post(server, **body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["param"], answer.json()["error"]["message"]


EVENT: TypeAdapter[Any] = TypeAdapter(Annotated[ResponseStreamEvent, Discriminator("type")])


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each is what the package says that it is, and no more than that."""
    found = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
        EVENT.validate_python(found[-1])
    return found


def test_whole_response(server: Server, client: openai.OpenAI) -> None:
    server.backend.script = say("Hel", "lo")
    answer = client.responses.create(
        model="gpt-any", input="hi", instructions="be brief", max_output_tokens=100, temperature=0.5
    )
    assert (answer.output_text, answer.status, answer.model) == ("Hello", "completed", "org/fake")
    assert (answer.object, answer.error, answer.incomplete_details) == ("response", None, None)
    assert (answer.instructions, answer.temperature, answer.max_output_tokens) == ("be brief", 0.5, 100)
    job = server.backend.runs[-1].job
    assert (job.max_tokens, job.sampling.temperature) == (100, 0.5)
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == len(job.prompt)
    assert (usage.output_tokens, usage.total_tokens) == (6, usage.input_tokens + 6)
    assert usage.input_tokens_details.cached_tokens == usage.output_tokens_details.reasoning_tokens == 0
    assert prompt(server).startswith("<|im_start|>system\nbe brief<|im_end|><|im_start|>user\nhi<|im_end|>")


def test_the_events_of_reasoning_a_message_and_a_call(server: Server, client: openai.OpenAI) -> None:
    server.backend.script = EVERYTHING
    got = events(post(server, tools=TOOLS, stream=True))
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    text = [
        "output_item.added",
        "content_part.added",
        *["KIND.delta"] * 2,
        "KIND.done",
        "content_part.done",
        "output_item.done",
    ]
    call = ["delta", "done"]
    assert [event["type"].removeprefix("response.") for event in got] == [
        "created",
        "in_progress",
        *(kind.replace("KIND", "reasoning_text") for kind in text),
        *(kind.replace("KIND", "output_text") for kind in text),
        "output_item.added",
        *(f"function_call_arguments.{kind}" for kind in call),
        "output_item.done",
        "completed",
    ]
    final = got[-1]["response"]
    thought, message, called = final["output"]
    assert [event["item"] for event in got if event["type"].endswith("item.done")] == final["output"]
    assert [part["text"] for part in thought["content"]] == ["hm"]
    assert "encrypted_content" not in thought
    assert [part["text"] for part in message["content"]] == ["So."]
    assert (called["name"], json.loads(called["arguments"])) == ("read", {"path": "a"})
    assert called["call_id"] != called["id"]
    assert final["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    assert (got[0]["response"]["output"], got[0]["response"]["status"]) == ([], "in_progress")
    whole = post(server, tools=TOOLS).json()
    for response in (final, whole):
        del response["id"], response["created_at"]
        for item in response["output"]:
            del item["id"]
            item.pop("call_id", None)
    assert final == whole
    with client.responses.stream(model="m", input="hi", tools=TOOLS) as stream:
        stream.until_done()
        answer = stream.get_final_response()
    assert answer.output_text == "So."
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kept", ["content", "encrypted_content"])
def test_a_tool_task_goes_on_where_the_answer_ended(
    server: Server, client: openai.OpenAI, stream: bool, kept: str
) -> None:
    server.backend.script = EVERYTHING
    talk: Any = [{"role": "developer", "content": "rules"}, {"role": "user", "content": "go"}]
    asked: Any = {"model": "m", "tools": TOOLS, "include": ["reasoning.encrypted_content"], "store": False}
    if stream:
        with client.responses.stream(input=talk, **asked) as events_:
            answer: Any = events_.until_done().get_final_response()
    else:
        answer = client.responses.create(input=talk, **asked)
    before = server.backend.runs[-1].job
    said = [*THINK, *b"hm", *END_THINK, *b"So.", *CALL, *READ.encode(), *END_CALL]
    items = [item.model_dump(exclude_none=True) for item in answer.output]
    del items[0]["content" if kept == "encrypted_content" else "encrypted_content"]
    result = {"type": "function_call_output", "call_id": items[-1]["call_id"], "output": "Blue."}
    client.responses.create(input=[*talk, *items, result], **asked)
    begun = [*before.prompt, *said]
    assert list(server.backend.runs[-1].job.prompt[: len(begun)]) == begun
    assert "<|im_end|><|im_start|>tool\nBlue.<|im_end|>" in prompt(server)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
def test_half_a_character_in_a_call_does_not_end_the_task(server: Server, path: str) -> None:
    server.backend.script = say(CALL, READ.replace('"a"', r'"a\ud83d"'), END_CALL)
    user, chat = {"role": "user", "content": "go"}, path != "/v1/responses"
    tool = {"type": "function", "function": {"name": "read"}} if chat else TOOLS[0]
    name, body = ("messages" if chat else "input"), {"tools": [tool]}
    with server.client() as client:
        answer = client.post(path, json={name: [user], **body}).json()
        said = [answer["choices"][0]["message"]] if chat else answer["output"]
        assert client.post(path, json={name: [user, *said, user], **body}).is_success
    assert '{"path": "a?"}' in prompt(server)


def test_length_is_an_incomplete_response(server: Server, client: openai.OpenAI) -> None:
    server.backend.script = say("abcdef")
    answer = client.responses.create(model="m", input="hi", max_output_tokens=3)
    assert (answer.status, answer.output_text) == ("incomplete", "abc")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    last = events(post(server, max_output_tokens=3, stream=True))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_what_has_no_meaning_for_the_model_does_not_change_the_prompt(server: Server) -> None:
    server.backend.script = say("ok")
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    dressed: dict[str, Any] = {
        "input": [{**item, "id": "msg_1", "status": "completed"}],
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "metadata": {"a": "b"},
        "client_metadata": {"c": "d"},
        "user": "u",
        "truncation": "auto",
        "reasoning": {"summary": "auto"},
        "text": {"verbosity": "low", "format": {"type": "text"}},
        "tools": [{"type": "web_search", "external_web_access": False}, {"type": "custom", "name": "patch"}],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "stream_options": {"include_obfuscation": False},
    }
    assert post(server).status_code == post(server, **dressed).status_code == 200
    first, second = (run.job.prompt for run in server.backend.runs[-2:])
    assert first == second
    told = post(server, **dressed).json()
    assert (told["metadata"], told["user"], told["tools"]) == ({"a": "b"}, "u", dressed["tools"])
    assert told["store"] is False


def test_functions_in_namespaces_are_called_by_both_names(server: Server) -> None:
    server.backend.script = say(CALL, '{"name": "agents__spawn", "arguments": {}}', END_CALL)
    tools = [
        {
            "type": "namespace",
            "name": "agents",
            "tools": [{"type": "function", "name": "spawn"}, {"type": "x"}],
        }
    ]
    (call,) = post(server, tools=tools).json()["output"]
    assert (call["namespace"], call["name"]) == ("agents", "spawn")
    assert '"name": "agents__spawn"' in prompt(server)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "up"}
    post(server, tools=tools, input=[{"role": "user", "content": "go"}, call, result])
    assert '<tool_call>{"name": "agents__spawn", "arguments": {}}</tool_call>' in prompt(server)


def test_effort_reaches_templates_that_know_it(server: Server) -> None:
    server.backend.script = say("ok")
    post(server, reasoning={"effort": "high"})
    assert prompt(server).endswith("high<|im_start|>assistant\n")
    post(server, reasoning={"effort": "none"})
    assert "none" not in prompt(server)


IMAGE = {"type": "input_image", "image_url": "data:,"}
FILE = {"type": "input_file", "file_data": "data:,"}


def test_an_image_that_a_tool_returns_does_not_end_the_session(server: Server) -> None:
    server.backend.script = say("ok")
    call = {"type": "function_call", "call_id": "1", "name": "view", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "1", "output": [IMAGE]}
    assert post(server, input=[{"role": "user", "content": "look"}, call, result]).is_success
    assert "<|im_start|>tool\n[an image, which this model cannot see]<|im_end|>" in prompt(server)


FORM = {"type": "json_schema", "name": "a", "schema": {"type": "foo"}}
FORCED = {"tool_choice": "required"}
BAD = {**TOOLS[0], "name": "bad", "parameters": {"type": "foo"}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "background"),
        ({"prompt": {"id": "p"}}, "prompt", "stored prompts"),
        ({"top_logprobs": 3}, "top_logprobs", "log-prob"),
        ({"include": ["message.output_text.logprobs"]}, "include", "log-prob"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "by reference"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type", "input_image"),
        ({"input": [{"type": "function_call_output", "output": [FILE]}]}, "input[0].output[0].type", "text"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", ""),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name", "required"),
        ({"input": [{"content": "x"}]}, "input[0].role", "required"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0].role", "required"),
        ({"input": [{"type": "web_search_call"}]}, "input", "nothing in it"),
        ({"input": []}, "input", ""),
        ({"input": None}, "input", ""),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role", "critic"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [TOOLS[0]] * 1025}]}, None, ""),
        ({"max_output_tokens": 0}, "max_output_tokens", ""),
        ({"temperature": "hot"}, "temperature", ""),
        ({"tool_choice": {"type": "web_search"}, "tools": TOOLS}, "tool_choice.type", "web_search"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "grammar"),
        ({"text": {"format": {**FORM, "name": "a b"}}}, "text.format.name", "text.format.name:"),
        ({"text": {"format": FORM}}, "text.format.schema", "text.format.schema:"),
        ({**FORCED, "tools": [{"type": "web"}, BAD]}, "tools[1].parameters", "tools[1].parameters:"),
        (
            {**FORCED, "tools": [{"type": "namespace", "name": "n", "tools": [*TOOLS, BAD]}]},
            "tools[0].tools[1].parameters",
            "tools[0].tools[1].parameters:",
        ),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
            "required",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice.name",
            "tool_choice.name:",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    server: Server, body: dict[str, Any], param: str | None, words: str
) -> None:
    server.backend.script = say("ok")
    if param is None:  # one function a thousand times is one function
        assert post(server, **body).is_success
        return
    at, message = refused(server, **body)
    assert at == param
    assert words in message


def test_too_many_functions_in_namespaces(server: Server) -> None:
    names = [{"type": "function", "name": f"f{n}"} for n in range(1025)]
    at, _ = refused(server, tools=[{"type": "namespace", "name": "n", "tools": names}])
    assert at == "tools"


def test_errors_before_the_answer(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model="m", input="x" * 9000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    server.backend.script = fail(Kind.BUSY, "busy, retry")
    busy = post(server)
    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "server_busy")
    assert "retry-after" in busy.headers


def test_a_stream_that_fails_says_so_to_agents_and_raises_in_the_package(
    server: Server, client: openai.OpenAI
) -> None:
    server.backend.script = fail(Kind.ENGINE_DIED, "it died", after="some")
    got: list[Any] = []
    with (
        client.responses.create(model="m", input="hi", stream=True) as stream,
        pytest.raises(openai.APIError, match="it died") as raised,
    ):
        got.extend(event for event in stream)
    assert raised.value.code == "engine_died"
    failed = got[-1]
    assert failed.type == "response.failed"
    assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
    assert failed.response.output == []
    assert not [event for event in got if event.type == "response.output_item.done"]
    last = events(post(server, stream=True))[-1]
    assert (last["type"], last["code"], last["message"]) == ("error", "engine_died", "it died")


def test_silence_is_broken_by_the_response_in_progress() -> None:
    with serving(say([], "late", pause=0.5), timing=Timing(keepalive=0.1)) as server:
        got = events(post(server, stream=True))
    kinds = [event["type"] for event in got]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds.count("response.in_progress") >= 3
    assert [event["sequence_number"] for event in got] == list(range(len(got)))
    assert "".join(event["delta"] for event in got if event["type"].endswith("text.delta")) == "late"


def test_an_answer_without_words(server: Server, client: openai.OpenAI) -> None:
    server.backend.script = say()
    assert client.responses.create(model="m", input="hi").output == []
    assert events(post(server, stream=True))[-1]["type"] == "response.completed"
