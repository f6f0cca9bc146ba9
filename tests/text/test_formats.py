from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.support import tiny_tokenizers as tiny

from penstock.text.errors import ModelFilesError
from penstock.text.formats import infer
from penstock.text.parts import TextParts
from penstock.text.tokenizer import Tokenizer
from penstock.text.tools import tool_format

TEMPLATES = {
    "minimax_m2": "<minimax:tool_call>",
    "gemma4": "<|tool_call>call:f{}<tool_call|>",
    "function_gemma": "<start_function_call>",
    "longcat": "<longcat_tool_call>",
    "glm47": "<tool_call>{{ name }}<arg_key>",
    "pythonic": "<|tool_list_start|>",
    "qwen3_coder": "{{ '<tool_call>\\n<function=' + tool_call.name }}",
    "kimi_k2": "<|tool_calls_section_begin|>",
    "minicpm5": '<function name="f"><param name="p">',
    "mistral": "[TOOL_CALLS]",
    "muse_spark": "<atem:function_calls>",
    "json_tools": "<tool_call>{{ tool_call.name }}",
}
VOCABULARIES = [
    (),
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
    ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<think>",),
]


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=repr)
@pytest.mark.parametrize("template", ["", "<tool_call>", *TEMPLATES.values()])
def test_infers_what_mlx_lm_infers(vocabulary: tuple[str, ...], template: str) -> None:
    from mlx_lm.tokenizer_utils import _infer_thinking, _infer_tool_parser

    backend = tiny.with_special(*vocabulary)
    peer = SimpleNamespace(chat_template=template, get_vocab=backend.get_vocab, encode=lambda *_, **__: [])
    reasoning, tools = infer(Tokenizer(backend, {}, frozenset()), template)
    assert (tools.name if tools else None) == _infer_tool_parser(peer)
    if tools is None or tools.name != "muse_spark":
        start, end, *_ = _infer_thinking(peer)
        assert ((reasoning.start, reasoning.end) if reasoning else (None, None)) == (start, end)


@pytest.mark.parametrize("name", [*TEMPLATES, "kimi_k3", "laguna"])
def test_every_parser_is_the_installed_one(name: str) -> None:
    from importlib import import_module

    theirs, ours = import_module(f"mlx_lm.tool_parsers.{name}"), tool_format(name)
    assert (ours.start, ours.end) == (theirs.tool_call_start, theirs.tool_call_end)


def test_the_model_may_name_its_parser() -> None:
    tokenizer = Tokenizer(tiny.byte_level(), {"tool_parser_type": "mistral"}, frozenset())
    _, tools = infer(tokenizer, "<tool_call> tool_call.name")
    assert tools is not None
    assert tools.name == "mistral"
    for name in ("no_such", "os.path", "../x"):
        with pytest.raises(ModelFilesError):
            infer(Tokenizer(tiny.byte_level(), {"tool_parser_type": name}, frozenset()), "")


def test_whether_the_template_opened_the_block() -> None:
    reasoning, _ = infer(Tokenizer(tiny.byte_level(), {}, frozenset()), "")
    assert reasoning is not None
    assert reasoning.starts_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not reasoning.starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not reasoning.starts_in_reasoning("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n")


def test_the_front_loads_all_of_it_without_mlx(tmp_path: Path) -> None:
    tiny.write_model(tmp_path, tiny.byte_level(), {"chat_template": "<tool_call>{{ tool_call.name }}"})
    program = f"""
import pathlib, sys
from penstock.text.parts import TextParts
from penstock.text.tools import tool_format
parts = TextParts.load(pathlib.Path({str(tmp_path)!r}))
assert parts.tools.parse('{{"name": "f"}}', [], 0)[0].name == 'f'
for name in {[*TEMPLATES, "kimi_k3", "laguna"]!r}:
    tool_format(name)
print([name for name in ("mlx", "mlx_lm", "transformers", "numpy", "penstock.engine") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_parts_of_a_model(tmp_path: Path) -> None:
    template = "{{ enable_thinking }} {{ x }}"
    tiny.write_model(
        tmp_path, tiny.byte_level(), {"chat_template": template}, generation_config={"temperature": 0.7}
    )
    parts = TextParts.load(tmp_path, chat_template_args={"x": 1})
    message = {"role": "user", "content": "hi"}
    assert parts.template.render([message], None) == "True 1"
    assert parts.template.render([message], None, kwargs={"enable_thinking": False}) == "False 1"
    assert parts.generation == {"temperature": 0.7}
