"""/v1/messages over real sockets with the real `anthropic` package, the engine scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from tests.support.fake_backend import Server, fail, say, serving, text_parts

from penstock.api.service import Timing
from penstock.config import Options
from penstock.errors import Kind

USER: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"name": "read", "description": "reads", "input_schema": {"type": "object"}}]
THINK, END_THINK, CALL, END_CALL = [259], [260], [261], [262]
READ = '{"name": "read", "arguments": {"path": "a"}}'


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with (
        anthropic.DefaultHttpxClient(verify=False, trust_env=False) as transport,
        anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0, http_client=transport) as made,
    ):
        yield made


def prompt(server: Server) -> str:
    """The text of the last request's prompt."""
    tokenizer = text_parts().tokenizer
    return b"".join(tokenizer.token_bytes(id) for id in server.backend.runs[-1].job.prompt).decode()


def post(server: Server, path: str = "/v1/messages?beta=true", **body: Any) -> httpx.Response:
    with server.client() as client:
        return client.post(path, json=body)


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_whole_message(server: Server, client: anthropic.Anthropic) -> None:
    server.backend.script = say("Hel", "lo")
    message = client.messages.create(model="claude-any", max_tokens=100, messages=USER, system="be brief")
    assert [block.model_dump() for block in message.content] == [
        {"type": "text", "text": "Hello", "citations": None}
    ]
    assert (message.role, message.stop_reason, message.model) == ("assistant", "end_turn", "org/fake")
    job = server.backend.runs[-1].job
    assert message.usage.input_tokens == len(job.prompt)
    assert message.usage.output_tokens == 6
    assert job.max_tokens == 100


def test_stream_of_thinking_text_and_a_call(server: Server, client: anthropic.Anthropic) -> None:
    server.backend.script = say(THINK, "hm", END_THINK, "So.", CALL, READ, END_CALL)
    with client.messages.stream(model="m", max_tokens=100, messages=USER, tools=TOOLS) as stream:
        kinds = [event.type for event in stream if event.type.startswith(("message", "content_block"))]
        message = stream.get_final_message()
    thought, text, call = message.content
    assert (thought.type, thought.thinking) == ("thinking", "hm")
    assert (text.type, text.text) == ("text", "So.")
    assert (call.type, call.name, call.input) == ("tool_use", "read", {"path": "a"})
    assert message.stop_reason == "tool_use"
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    whole = client.messages.create(model="m", max_tokens=100, messages=USER, tools=TOOLS)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.content[2].input == {"path": "a"}  # type: ignore[union-attr]


def test_an_empty_answer_is_an_empty_text(server: Server, client: anthropic.Anthropic) -> None:
    server.backend.script = say("")
    with client.messages.stream(model="m", max_tokens=9, messages=USER) as stream:
        kinds = [event.type for event in stream if event.type.startswith("content_block")]
        assert stream.get_final_text() == ""
    assert kinds == ["content_block_start", "content_block_delta", "content_block_stop"]
    whole = client.messages.create(model="m", max_tokens=9, messages=USER)
    assert [(block.type, block.text) for block in whole.content] == [("text", "")]  # type: ignore[union-attr]


def test_stop_sequences_and_length(server: Server, client: anthropic.Anthropic) -> None:
    server.backend.script = say("one STOP two")
    stopped = client.messages.create(model="m", max_tokens=50, messages=USER, stop_sequences=["x", "STOP"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "STOP")
    assert stopped.content[0].text == "one "  # type: ignore[union-attr]
    server.backend.script = say("abc", reason="length")
    assert client.messages.create(model="m", max_tokens=3, messages=USER).stop_reason == "max_tokens"


def test_what_clients_change_without_meaning_does_not_change_the_prompt(server: Server) -> None:
    server.backend.script = say("ok")
    plain: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "system": "Be kind."}
    dressed: dict[str, Any] = {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
            }
        ],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.abc;"},
            {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}},
        ],
        "metadata": {"user_id": "{}"},
        "context_management": {"edits": []},
        "output_config": {"effort": "high"},
    }
    assert post(server, **plain).status_code == post(server, **dressed).status_code == 200
    first, second = (run.job.prompt for run in server.backend.runs[-2:])
    assert first == second


def test_of_a_system_prompt_the_billing_line_alone_is_left_out(server: Server) -> None:
    server.backend.script = say("ok")
    line = "x-anthropic-billing-header: cc_version=2.1.197.abc;"
    told = f"Be kind.\n{line}"
    for system in (f"{line}\n{told}", [{"type": "text", "text": f"{line}\n{line}\n{told}"}]):
        assert post(server, messages=USER, system=system).is_success
        assert f"<|im_start|>system\n{told}<|im_end|>" in prompt(server)
    for system in (line, f"{line}\n"):
        assert post(server, messages=USER, system=system).is_success
        assert "system" not in prompt(server)


NAMELESS = {"type": "mcp_toolset", "mcp_server_name": "x"}


def test_a_tool_task_becomes_the_turns_that_templates_know(server: Server) -> None:
    server.backend.script = say("ok")
    talk = [
        {"role": "user", "content": "go"},
        {"role": "system", "content": "skills: none"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I read."},
                {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "A"}]},
                {"type": "text", "text": "now say"},
            ],
        },
    ]
    assert post(
        server, messages=talk, tools=[*TOOLS, {"type": "web_search_20250305", "name": "web"}, NAMELESS]
    ).is_success
    text = prompt(server)
    assert text.index("go") < text.index("skills: none") < text.index("I read.")
    assert "I read.<tool_call>" in text
    assert text.index("<|im_start|>tool\nA") < text.index("<|im_start|>user\nnow say")
    assert "[1 tools]" in text


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


def test_an_image_that_a_tool_returns_does_not_end_the_session(server: Server) -> None:
    server.backend.script = say("ok")
    call = {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a.png"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [IMAGE]}
    talk = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert post(server, messages=talk, tools=TOOLS).is_success
    assert "<|im_start|>tool\n[an image, which this model cannot see]<|im_end|>" in prompt(server)


def test_errors_have_anthropics_shape_and_words(server: Server, client: anthropic.Anthropic) -> None:
    with pytest.raises(
        anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"
    ) as long:
        client.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "x" * 9000}])
    assert long.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    refused = post(server, messages=[{"role": "user", "content": [IMAGE]}])
    assert refused.status_code == 400
    assert "messages[0].content[0]" in refused.json()["error"]["message"]
    assert refused.json()["type"] == "error"
    for choice in ({"type": "any"}, {"type": "tool"}, {"type": "tool", "name": "no"}, {"type": "x"}):
        forced = post(server, messages=USER, tools=TOOLS if "name" in choice else [], tool_choice=choice)
        assert (forced.status_code, "tool_choice" in forced.json()["error"]["message"]) == (400, True)
    web, bad, kind = {"type": "web_search_20250305", "name": "web"}, {"type": "foo"}, {"type": "any"}
    tools = [web, {"name": "f", "input_schema": bad}]
    form = {"type": "json_schema", "schema": bad}
    for path, body in {
        "tools[1].input_schema": {"tools": tools, "tool_choice": kind},
        "tool_choice.name": {"tools": tools, "tool_choice": {"type": "tool", "name": "no"}},
        "output_config.format.schema": {"output_config": {"format": form}},
    }.items():
        refused = post(server, messages=USER, **body)
        assert (refused.status_code, refused.json()["error"]["message"].split(":")[0]) == (400, path)
    nameless = post(server, messages=USER, tools=[NAMELESS, {"type": "custom"}])
    assert (nameless.status_code, "tools[1].name" in nameless.json()["error"]["message"]) == (400, True)
    missing = post(server, max_tokens=3)
    assert (missing.status_code, "messages" in missing.json()["error"]["message"]) == (400, True)
    server.backend.script = fail(Kind.BUSY, "busy, retry")
    busy = post(server, messages=USER)
    assert (busy.status_code, busy.json()["error"]["type"]) == (503, "overloaded_error")
    assert "retry-after" in busy.headers


def test_a_stream_that_fails_says_so_in_an_event(server: Server, client: anthropic.Anthropic) -> None:
    server.backend.script = fail(Kind.ENGINE_DIED, "it died", after="some")
    with (
        pytest.raises(anthropic.APIStatusError),
        client.messages.stream(model="m", max_tokens=9, messages=USER) as stream,
    ):
        stream.until_done()


def test_silence_is_broken_by_an_empty_delta_in_an_open_block() -> None:
    with serving(say([], "late", pause=0.5), timing=Timing(keepalive=0.1)) as server:
        got = events(post(server, messages=USER, stream=True))
    kinds = [kind for kind, _ in got]
    assert kinds[:2] == ["message_start", "ping"]
    empty = [data for kind, data in got if kind == "content_block_delta" and not data["delta"]["text"]]
    assert len(empty) >= 2
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1
    text = "".join(data["delta"]["text"] for kind, data in got if kind == "content_block_delta")
    assert text == "late"


def test_counting_tokens_asks_nothing_of_the_engine(server: Server, client: anthropic.Anthropic) -> None:
    server.backend.script = say("ok")
    before = len(server.backend.runs)
    counted = client.messages.count_tokens(model="m", messages=USER, system="Be kind.", tools=TOOLS)
    assert len(server.backend.runs) == before
    client.messages.create(model="m", max_tokens=5, messages=USER, system="Be kind.", tools=TOOLS)
    assert counted.input_tokens == len(server.backend.runs[-1].job.prompt)


def test_tools_that_may_not_be_used_are_neither_rendered_nor_counted(server: Server) -> None:
    server.backend.script = say("ok")
    body = {"messages": USER, "tools": TOOLS, "tool_choice": {"type": "none"}}
    counted = post(server, "/v1/messages/count_tokens", **body).json()["input_tokens"]
    assert post(server, **body).is_success
    assert "tools]" not in prompt(server)
    assert counted == len(server.backend.runs[-1].job.prompt)


def test_half_a_character_in_a_call_is_a_question_mark(server: Server) -> None:
    server.backend.script = say(CALL, r'{"name": "read", "arguments": {"path": "a\ud83d"}}', END_CALL)
    (call,) = post(server, messages=USER, tools=TOOLS).json()["content"]
    assert call["input"] == {"path": "a?"}
    server.backend.script = say("ok")
    turns = [*USER, {"role": "assistant", "content": [call]}]
    assert post(server, messages=turns, tools=TOOLS).is_success


def test_the_key_may_come_in_anthropics_header() -> None:
    with serving(say("ok"), options=Options(api_key=("secret",))) as server, server.client() as client:
        body = {"messages": USER}
        refused = client.post("/v1/messages", json=body, headers={"x-api-key": "no"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert client.post("/v1/messages", json=body, headers={"x-api-key": "secret"}).is_success


def test_a_call_streams_as_it_is_written(server: Server, client: anthropic.Anthropic) -> None:
    """Several fragments of one block, which the package joins; a cut one is no tool_use."""
    inner = '{"name": "read", "arguments": {"path": "abcdefgh"}}'
    server.backend.script = say([261], *inner, [262])
    with client.messages.stream(model="m", max_tokens=99, messages=USER, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1
    assert kinds.count("input_json") > 5
    assert (message.stop_reason, message.content[0].type) == ("tool_use", "tool_use")
    assert message.content[0].input == {"path": "abcdefgh"}
    server.backend.script = say([261], *inner, [262])
    with client.messages.stream(model="m", max_tokens=40, messages=USER, tools=TOOLS) as stream:
        stops = [event for event in stream if event.type == "message_stop"]
        assert stream.get_final_message().stop_reason == "max_tokens"
    assert len(stops) == 1
