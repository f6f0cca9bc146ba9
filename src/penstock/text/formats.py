"""Which marks a model puts around its reasoning and its tool calls, read off its vocabulary and template.

Owns the table of marks and the order in which they are tried (mlx-lm's order, so that a model gets the
parser it gets there; harmony, gpt-oss's format, is known here only). Refuses to guess: a model that shows
no marks gets None, and its answers are plain text.

An answer is a walk through states; `edges` say which string leads from which state to which:

    content ──start──▶ reasoning ──end──▶ content        (header: text that is dropped, between messages)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
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
    resumed: str = ""
    """With headers: what is written between `end` and the next message's header, where that is known."""

    def transitions(self) -> dict[str, dict[str, str]]:
        """state → string → next state, without tool calls."""
        edges = self.edges or {CONTENT: {self.start: REASONING}, REASONING: {self.end: CONTENT}}
        return {state: dict(targets) for state, targets in edges.items()}

    def starts_in_reasoning(self, rendered_prompt: str) -> bool:
        """Whether the template opened the block: the prompt ends in its start.

        Only the end of the prompt counts, because a conversation may well speak of the marks.
        """
        return self.initial == CONTENT and rendered_prompt.rstrip().endswith(self.start)


def _messages(
    thought: str, *said: str, end: str, dropped: Iterable[str] = (), resumed: str = ""
) -> ReasoningMarkers:
    """Each message begins with a header, whose end tells thoughts from what is said."""
    headers = {thought: REASONING, **dict.fromkeys(said, CONTENT)}
    inside = {end: HEADER, **dict.fromkeys(dropped, CONTENT)}
    edges = {HEADER: headers, REASONING: {end: HEADER}, CONTENT: inside}
    return ReasoningMarkers(thought, end, HEADER, edges, resumed)


_XTML_TOKENS = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
_XTML_DROPPED = ("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>")
_XTML_START, _XTML_END = "<|open|>think<|sep|>", "<|close|>think<|sep|>"
_XTML = {
    CONTENT: {_XTML_START: REASONING, **dict.fromkeys(_XTML_DROPPED, CONTENT)},
    REASONING: {_XTML_END: CONTENT},
}
_MUSE = _messages(
    "to=self<|message|>", "to=user<|message|>", "to=commentary<|message|>", end="<|eom|>", dropped=["<|eot|>"]
)
_HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>")
_HARMONY = _messages(
    "<|channel|>analysis<|message|>",
    "<|channel|>final<|message|>",
    "<|channel|>commentary<|message|>",
    end="<|end|>",
    resumed="<|start|>assistant",
)
_REASONING_BY_TOKENS = {
    ("<think>", "</think>"): ReasoningMarkers("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"): ReasoningMarkers("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"): ReasoningMarkers("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"): ReasoningMarkers("<|channel>thought", "<channel|>"),
    _XTML_TOKENS: ReasoningMarkers(_XTML_START, _XTML_END, edges=_XTML),
    _HARMONY_TOKENS: _HARMONY,
}
"""The first all of whose keys the vocabulary has."""


def infer(
    tokenizer: Tokenizer, template_source: str | None
) -> tuple[ReasoningMarkers | None, ToolFormat | None]:
    """The marks of a model. `template_source`: its chat template. Raises ModelFilesError."""
    parser = tokenizer.config.get("tool_parser_type") or _parser_name(tokenizer, template_source or "")
    by_tokens = (marks for tokens, marks in _REASONING_BY_TOKENS.items() if _knows(tokenizer, tokens))
    reasoning = _MUSE if parser == "muse_spark" else next(by_tokens, None)
    return reasoning, tool_format(str(parser)) if parser else None


def _knows(tokenizer: Tokenizer, tokens: Iterable[str]) -> bool:
    return all(tokenizer.id_of(token) is not None for token in tokens)


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


_PARSER_TOKENS = (
    ("kimi_k3", _XTML_TOKENS),
    ("pythonic", ("<|tool_call_start|>", "<|tool_call_end|>")),
    ("harmony", _HARMONY_TOKENS),
)


def _parser_name(tokenizer: Tokenizer, template: str) -> str | None:
    by_template = (name for name, signs in _PARSER_SIGNS if all(sign in template for sign in signs))
    by_tokens = (name for name, tokens in _PARSER_TOKENS if _knows(tokenizer, tokens))
    return next(chain(by_template, by_tokens), None)
