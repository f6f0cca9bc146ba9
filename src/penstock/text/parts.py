"""All that the front knows of a model's text: tokenizer, template, marks, and the model's own defaults.

Loaded once, from the files of the model alone; immutable, so the pool's threads share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.cache.checkpoints import Markers
from penstock.text.borders import learned
from penstock.text.formats import ReasoningMarkers, infer
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer, read_json
from penstock.text.tools import ToolFormat

NO_MARKERS = Markers(frozenset(), frozenset(), 0)


@dataclass(frozen=True)
class TextParts:
    """generation: the model's generation_config.json (sampling defaults), {} if it has none."""

    tokenizer: Tokenizer
    template: ChatTemplate
    reasoning: ReasoningMarkers | None
    tools: ToolFormat | None
    generation: dict[str, Any]
    markers: Markers = NO_MARKERS

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        chat_template: str | None = None,
        use_default_chat_template: bool = False,
        chat_template_args: dict[str, Any] | None = None,
    ) -> TextParts:
        """Reads the files of a model, in some tenths of a second. Raises ModelFilesError.

        Templates see `enable_thinking` = whether the model can reason, as under mlx_lm.server, unless
        `chat_template_args` or a request says otherwise.
        """
        tokenizer = Tokenizer.load(model_dir)
        template = ChatTemplate.load(model_dir, chat_template, use_default_chat_template)
        reasoning, tools = infer(tokenizer, template.source)
        defaults = {"enable_thinking": reasoning is not None, **(chat_template_args or {})}
        generation = read_json(model_dir / "generation_config.json")
        template = template.with_defaults(defaults)
        return cls(tokenizer, template, reasoning, tools, generation, learned(tokenizer, template))
