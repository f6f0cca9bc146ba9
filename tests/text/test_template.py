from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tests.support import chat_templates, tiny_tokenizers
from transformers import PreTrainedTokenizerFast

from penstock.errors import Kind, PenstockError
from penstock.text import template as module
from penstock.text.errors import ModelFilesError
from penstock.text.template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "  Häl<lo> & 'quotes' \n"}
REPLY = {"role": "assistant", "content": "\nJa\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abc123def",
            "type": "function",
            "function": {"name": "f", "arguments": {"z": 1, "a": ["<ü>", None]}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abc123def", "content": "42"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "Does <f> & more",
            "parameters": {"type": "object", "properties": {"z": {"type": "integer"}}},
        },
    }
]
THOUGHT = {**REPLY, "reasoning_content": "I think."}

CONVERSATIONS = {
    "question": [USER],
    "turns": [USER, REPLY, USER],
    "system": [SYSTEM, USER, REPLY, USER],
    "tools": [SYSTEM, USER, CALL, RESULT, RESULT, THOUGHT, USER],
    "thought": [USER, THOUGHT],
}


def render(source: str, messages: list[dict[str, Any]], tools: Any = None, /, **kwargs: Any) -> str:
    return ChatTemplate({"default": source}, TOKENS).render(copy.deepcopy(messages), tools, kwargs=kwargs)


def theirs(source: str, messages: list[dict[str, Any]], tools: Any = None, **kwargs: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizers.byte_level(), chat_template=source, **TOKENS
    )
    rendered = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, **kwargs
    )
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "with tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", chat_templates.ALL)
def test_renders_what_transformers_renders(family: str, conversation: str, tools: Any) -> None:
    source, messages = chat_templates.ALL[family], CONVERSATIONS[conversation]
    if family == "gemma" and conversation not in ("question", "turns", "thought"):
        pytest.skip("this family knows neither system messages nor tools")
    expected = theirs(source, messages, tools)
    assert render(source, messages, tools) == expected


def test_names_in_scope_reach_the_template_like_in_transformers() -> None:
    kwargs = {"enable_thinking": False, "date_string": "2000", "bos_token": "<bos>", "documents": [{"a": 1}]}
    for source in (chat_templates.QWEN, chat_templates.LLAMA3):
        assert render(source, [USER], **kwargs) == theirs(source, [USER], **kwargs)


def test_a_request_cannot_set_what_is_the_servers() -> None:
    text = "{{ messages[0].content }}|{{ tools }}|{{ add_generation_prompt }}|{{ chat_template is defined }}"
    stolen = {
        "messages": [],
        "tools": 1,
        "add_generation_prompt": 0,
        "chat_template": "x",
        "tokenize": 1,
        "_x": 1,
        "a-b": 1,
    }
    assert render(text, [{"role": "user", "content": "hi"}], **stolen) == "hi|None|True|False"
    assert (
        render(
            "{{ raise_exception('mine') if strict else raise_exception is string }}",
            [USER],
            raise_exception="x",
        )
        == "False"
    )


def test_a_refusal_is_an_error_in_the_templates_words() -> None:
    with pytest.raises(PenstockError) as caught:
        render(chat_templates.LLAMA3, [{**CALL, "tool_calls": CALL["tool_calls"] * 2}])
    assert caught.value.kind is Kind.TEMPLATE
    assert "One call at a time!" in caught.value.message
    for broken in (
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages | first | nope }}",
    ):
        with pytest.raises((PenstockError, ModelFilesError)) as caught_other:
            render(broken, [USER])
        assert "Traceback" not in str(caught_other.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__()[0] }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__'))|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% set x = messages.append(1) %}{{ messages | length }}",
        "{% set ns = namespace(__class__=1) %}{{ ns.__class__ }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ strftime_now.__code__ }}",
    ],
)
def test_no_way_out_of_the_sandbox(attack: str) -> None:
    try:
        text = render(attack, [USER])
    except PenstockError as refusal:
        text = "" if refusal.kind is Kind.TEMPLATE else str(refusal)
    assert text.strip() == ""


@pytest.mark.parametrize(
    "flood",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ ['a'] * 10000000000 }}",
        "{{ 10 ** 10000 }}",
        "{% for a in range(90000) %}{{ messages[0].content }}{% endfor %}",
    ],
)
def test_the_size_of_a_prompt_is_bounded(flood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RENDERED", 1 << 16)
    with pytest.raises(PenstockError, match="too large"):
        render(flood, [USER])
    assert render("{{ 'ab' * 3 }}{{ 2 * 3 }}{{ 2 ** 5 }}", [USER]) == "ababab632"


# Where the template comes from


def load(folder: Path, **options: Any) -> str:
    return ChatTemplate.load(folder, **options).render([{"role": "user", "content": "hi"}], None)


def test_finds_the_template_where_models_keep_it(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load(tmp_path) == "json"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "config {{ eos_token }}", "eos_token": {"content": "E"}})
    )
    assert load(tmp_path) == "config E"
    (tmp_path / "chat_template.jinja").write_text("file ü", encoding="utf-8")
    assert load(tmp_path) == "file ü"
    assert load(tmp_path, override="mine {{ 1 }}") == "mine 1"
    (tmp_path / "other.jinja").write_text("other")
    assert load(tmp_path, override=str(tmp_path / "other.jinja")) == "other"
    with pytest.raises(ModelFilesError, match="neither a template nor a file"):
        load(tmp_path, override="no-such-file")


def test_named_templates(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.load(tmp_path)
    assert template.render([USER], None) == "plain"
    assert template.render([USER], []) == "plain"
    assert template.render([USER], TOOLS) == "with tools"
    config.write_text(json.dumps({"chat_template": named[1:]}))
    with pytest.raises(ModelFilesError, match="no default"):
        ChatTemplate.load(tmp_path)


def test_a_template_that_does_not_parse_is_a_fault_of_the_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="not valid"):
        load(tmp_path, override="{% if %}")


def test_a_template_that_cannot_be_read_is_a_fault_of_the_files(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    for named in ([{"name": "default"}], ["default"], [{"template": "x"}]):
        config.write_text(json.dumps({"chat_template": named}))
        with pytest.raises(ModelFilesError, match="can't be read"):
            load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(ModelFilesError, match=r"can't be read.*0xff"):
        load(tmp_path)


def test_a_template_that_is_a_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template_type": "deepseek_v32"}))
    with pytest.raises(ModelFilesError, match="--chat-template"):
        load(tmp_path)
    assert load(tmp_path, override="{{ 1 }}") == "1"


def test_a_model_without_a_template(tmp_path: Path) -> None:
    plain = ChatTemplate.load(tmp_path)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "U"}]},
    ]
    assert plain.adds_special_tokens
    assert plain.render(messages, None) == "ASSISTANT's RULE: S\nUSER: U\nASSISTANT:"
    mapping = {"user": "Q: ", "assistant": "A: ", "stop": "|"}
    assert plain.render(messages, None, role_mapping=mapping) == "S|Q: U|A:"
    chatml = ChatTemplate.load(tmp_path, use_default=True)
    assert chatml.render(messages[1:], None) == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert not chatml.adds_special_tokens


def test_defaults_yield_to_the_request() -> None:
    template = ChatTemplate({"default": "{{ a }}{{ b }}"}).with_defaults({"a": 1, "b": 1})
    assert template.render([USER], None, kwargs={"a": 2}) == "21"
    assert template.with_defaults({"b": 3}).render([USER], None) == "13"
    assert template.render([USER], None) == "11"


# Conversations that templates refuse

LATE = [SYSTEM, USER, REPLY, {"role": "system", "content": "New rule."}, {"role": "user", "content": "Next"}]


def test_a_late_system_message_stays_in_its_place() -> None:
    text = render(chat_templates.LLAMA3, LATE)
    assert "<|start_header_id|>system<|end_header_id|>\n\nNew rule.<|eot_id|>" in text, (
        "Llama takes it as it is"
    )
    for source in (chat_templates.QWEN, chat_templates.MISTRAL, chat_templates.GEMMA):
        text = render(source, LATE)
        assert text.index("Ja") < text.index("<system>\nNew rule.\n</system>") < text.index("Next")
    assert "<|im_start|>user\n<system>\nNew rule.\n</system><|im_end|>" in render(chat_templates.QWEN, LATE)


def test_a_template_that_drops_or_hoists_late_system_messages_is_found_out() -> None:
    drops = "{% for m in messages if m.role != 'system' or loop.first %}[{{ m.content }}]{% endfor %}"
    hoists = (
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
        "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
    )
    for source in (drops, hoists):
        text = render(source, LATE)
        assert text.index("Ja") < text.index("New rule.") < text.index("Next")


def test_templates_without_a_system_role_or_with_strict_turns() -> None:
    text = render(chat_templates.GEMMA, [SYSTEM, {"role": "user", "content": "Hi"}])
    assert text.startswith("<s>")
    assert "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>" in text
    text = render(
        chat_templates.GEMMA, [{"role": "user", "content": "Hi"}, {"role": "user", "content": "there"}]
    )
    assert "<start_of_turn>user\nHi\n\nthere<end_of_turn>" in text
    with pytest.raises(PenstockError, match="must alternate"):
        render(chat_templates.GEMMA, [REPLY, USER])


@pytest.mark.parametrize("source", [chat_templates.QWEN, chat_templates.LLAMA3, chat_templates.MISTRAL])
def test_calls_as_clients_send_them_back(source: str) -> None:
    """None at all, arguments of none, arguments that were cut."""
    assert render(source, [USER, {**REPLY, "tool_calls": []}]) == render(source, [USER, REPLY])

    def rendered(arguments: Any) -> str:
        call = {"id": "abc123def", "function": {"name": "f", "arguments": arguments}}
        return render(source, [USER, {**REPLY, "tool_calls": [call]}, RESULT])

    assert rendered(None) == rendered("null") == rendered({})
    assert "cut sh" in rendered('{"a": "cut sh')


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    for source in (chat_templates.QWEN, chat_templates.LLAMA3):
        template = ChatTemplate({"default": source}, TOKENS)
        grown = [*LATE, {"role": "assistant", "content": "Ok"}, {"role": "system", "content": "More."}, USER]
        shorter, longer = (template.render(m, None, add_generation_prompt=False) for m in (LATE, grown))
        assert longer.startswith(shorter)
