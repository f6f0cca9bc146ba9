"""Structured output end to end: the demo model behind `penstock serve`, asked by the `openai` package."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel
from tests.support.whole_server import WholeServer

from penstock.models import DEMO

USER: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
QUICK: Any = {"chat_template_kwargs": {"enable_thinking": False}}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 1},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop"}},
]


class Report(BaseModel):
    kind: Literal["sun", "rain"]
    degrees: int
    windy: bool


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeServer]:
    with WholeServer(DEMO, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module", name="client")
def _client(server: WholeServer) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(verify=False, trust_env=False, timeout=120) as transport,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=transport) as made,
    ):
        yield made


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    body = {"extra_body": QUICK, "max_tokens": 600, "temperature": 0.7, **fields}
    return client.chat.completions.create(model="any", messages=USER, **body)


def degrees(schema: dict[str, Any]) -> dict[str, Any]:
    """A class's schema with bounds that a small model can't write past."""
    schema["properties"]["degrees"] |= {"minimum": -50, "maximum": 50}
    return schema


def test_parse_gives_an_object_of_the_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="any", messages=USER, response_format=Report, max_tokens=2000, temperature=0, extra_body=QUICK
    )
    assert isinstance(answer.choices[0].message.parsed, Report)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_however_the_model_is_asked(client: openai.OpenAI, stream: bool) -> None:
    """The body that LangChain's with_structured_output sends; with and without a thought before it."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "Report", "schema": degrees(Report.model_json_schema()), "strict": True},
    }
    for seed, thinks in ((1, False), (2, True), (3, False)):
        extra = {"chat_template_kwargs": {"enable_thinking": thinks}}
        answer = chat(client, response_format=form, stream=stream, seed=seed, extra_body=extra)
        if stream:
            chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
            content = "".join(choice.delta.content or "" for choice in chunks)
            reason = chunks[-1].finish_reason
        else:
            content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        if reason == "length" and thinks:
            continue  # it never stopped to think
        assert reason == "stop"
        Report.model_validate_json(content)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    form = {"type": "json_object", "schema": WEATHER}
    for path in ("chat", "completions"):
        if path == "chat":
            text = chat(client, response_format=form).choices[0].message.content
        else:
            more: Any = {"response_format": form}
            text = (
                client.completions.create(model="any", prompt="x", max_tokens=300, extra_body=more)
                .choices[0]
                .text
            )
        assert json.loads(text)["city"] in ("Paris", "Rome")


def test_a_required_call_is_a_call_with_valid_arguments(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = chat(
            client, tools=TOOLS, tool_choice="required", seed=seed, parallel_tool_calls=False
        ).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name in ("get_weather", "stop")
        assert set(arguments) == ({"city", "days"} if call.function.name == "get_weather" else set())


def test_a_named_call_is_that_call(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choices in (1, 3):
        answer = chat(client, tools=TOOLS, tool_choice=named, n=choices)
        for choice in answer.choices:
            (call,) = choice.message.tool_calls
            assert call.function.name == "get_weather"
            arguments = json.loads(call.function.arguments)
            assert (arguments["city"] in ("Paris", "Rome"), 1 <= arguments["days"] <= 9) == (True, True)


def test_a_cut_answer_says_so(client: openai.OpenAI) -> None:
    answer = chat(client, tools=TOOLS, tool_choice="required", max_tokens=6).choices[0]
    assert (answer.finish_reason, answer.message.tool_calls) == ("length", None)
    assert "<tool_call>" in answer.message.content


def test_a_bad_schema_names_its_field(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, response_format=form)
    assert refused.value.param == "response_format.json_schema.schema"


def test_an_engine_that_dies_in_the_middle_does_not_cut_a_schema(server: WholeServer) -> None:
    """The stream goes on where it was, inside the grammar, and ends as one whole document."""
    items = {"type": "array", "items": WEATHER, "minItems": 30, "maxItems": 30}
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": items}}
    body = {"messages": USER, "response_format": form, "stream": True, "seed": 4, **QUICK}
    text, reason, killed = "", None, False
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
            if len(text) > 300 and not killed:
                killed = True
                os.kill(server.health()["engine"]["pid"], signal.SIGKILL)
    assert killed
    assert reason == "stop"
    assert len(json.loads(text)) == 30
    assert server.health()["engine_deaths"] == 1
