"""Which marks a model puts around its reasoning and its tool calls, read off its vocabulary and template.

Owns the table of marks and the order in which they are tried (mlx-lm's order, so that a model gets the
parser it gets there; harmony, gpt-oss's format, is known here only). Refuses to guess: a model that shows
no marks gets None, and its answers are plain text.

An answer is a walk through states; `edges` say which string leads from which state to which:

    content ──start──▶ reasoning ──end──▶ content        (header: text that is dropped, between messages)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from penstock.text.tokenizer import Tokenizer
from penstock.text.tools import ToolFormat, tool_format

CONTENT: Final = "content"
REASONING: Final = "reasoning"
TOOL: Final = "tool"
HEADER: Final = "header"

Edges = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class ReasoningMarkers:
    """Reasoning stands between `start` and `end`; `edges` tell more where that pair is not all.

    initial: the state that an answer begins in.
    """

    start: str
    end: str
    initial: str = CONTENT
    edges: Edges = field(default_factory=dict)

    def transitions(self) -> dict[str, dict[str, str]]:
        """state → string → next state, without tool calls."""
        edges = self.edges or {CONTENT: {self.start: REASONING}, REASONING: {self.end: CONTENT}}
        return {state: dict(targets) for state, targets in edges.items()}

    def starts_in_reasoning(self, rendered_prompt: str) -> bool:
        """Whether the template opened the block: the prompt ends in its start.

        Only the end of the prompt counts, because a conversation may well speak of the marks.
        """
        return self.initial == CONTENT and rendered_prompt.rstrip().endswith(self.start)


_PAIRS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
)
_GEMMA4 = ReasoningMarkers("<|channel>thought", "<channel|>")
_XTML_VOCABULARY = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
_XTML = ReasoningMarkers(
    "<|open|>think<|sep|>",
    "<|close|>think<|sep|>",
    edges={
        CONTENT: {
            "<|open|>think<|sep|>": REASONING,
            "<|open|>response<|sep|>": CONTENT,
            "<|close|>response<|sep|>": CONTENT,
            "<|close|>message<|sep|>": CONTENT,
        },
        REASONING: {"<|close|>think<|sep|>": CONTENT},
    },
)
_MUSE = ReasoningMarkers(
    "to=self<|message|>",
    "<|eom|>",
    HEADER,
    {
        HEADER: {
            "to=self<|message|>": REASONING,
            "to=user<|message|>": CONTENT,
            "to=commentary<|message|>": CONTENT,
        },
        REASONING: {"<|eom|>": HEADER},
        CONTENT: {"<|eom|>": HEADER, "<|eot|>": CONTENT},
    },
)
_HARMONY_VOCABULARY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>")
_HARMONY = ReasoningMarkers(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    HEADER,
    {
        HEADER: {
            "<|channel|>analysis<|message|>": REASONING,
            "<|channel|>final<|message|>": CONTENT,
            "<|channel|>commentary<|message|>": CONTENT,
        },
        REASONING: {"<|end|>": HEADER},
        CONTENT: {"<|end|>": HEADER},
    },
)


def infer(
    tokenizer: Tokenizer, template_source: str | None
) -> tuple[ReasoningMarkers | None, ToolFormat | None]:
    """The marks of a model. `template_source`: its chat template. Raises ModelFilesError."""
    parser = tokenizer.config.get("tool_parser_type") or _parser_name(tokenizer, template_source or "")
    reasoning = _MUSE if parser == "muse_spark" else _reasoning(tokenizer)
    return reasoning, tool_format(str(parser)) if parser else None


def _knows(tokenizer: Tokenizer, *tokens: str) -> bool:
    return all(tokenizer.id_of(token) is not None for token in tokens)


def _reasoning(tokenizer: Tokenizer) -> ReasoningMarkers | None:
    for start, end in _PAIRS:
        if _knows(tokenizer, start, end):
            return ReasoningMarkers(start, end)
    if _knows(tokenizer, "<|channel>", "<channel|>"):
        return _GEMMA4
    if _knows(tokenizer, *_XTML_VOCABULARY):
        return _XTML
    if _knows(tokenizer, *_HARMONY_VOCABULARY):
        return _HARMONY
    return None


_PARSER_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # The first parser all of whose signs stand in the template; a sign may be spelt in several ways.
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<tool_call>\\n<function=",)),
    ("qwen3_coder", ("<tool_call>\n<function=",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>", "tool_call.name")),
)


def _parser_name(tokenizer: Tokenizer, template: str) -> str | None:
    for name, signs in _PARSER_SIGNS:
        if all(sign in template for sign in signs):
            return name
    if _knows(tokenizer, *_XTML_VOCABULARY):
        return "kimi_k3"
    if _knows(tokenizer, "<|tool_call_start|>", "<|tool_call_end|>"):
        return "pythonic"
    if _knows(tokenizer, *_HARMONY_VOCABULARY):
        return "harmony"
    return None
