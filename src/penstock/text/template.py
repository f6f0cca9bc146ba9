"""A model's chat template: messages to the text of a prompt, in a sandbox.

Owns the compiled template and which conversations it takes. Renders what `transformers` renders, and no
more than MAX_RENDERED characters. Refuses what the template refuses, once mending has been tried.
Invariant: `render` returns text or raises PenstockError; a template's own words reach the client, a
traceback never does.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from penstock.errors import Kind, PenstockError
from penstock.text.conversation import Message, join_turns, normalise, plain_dialogue, tag_late_systems
from penstock.text.errors import ModelFilesError
from penstock.text.sandbox import MAX_RENDERED, environment
from penstock.text.tokenizer import read_json, special_tokens

RESERVED = frozenset(
    {
        *("messages", "tools", "conversation", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "tokenizer_kwargs", "chat_template", "return_dict", "return_tensors"),
        *("return_assistant_tokens_mask", "padding", "truncation", "max_length"),
        *("raise_exception", "strftime_now", "namespace", "dict", "range"),
    }
)
"""What a request's chat_template_kwargs can't set."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatTemplate:
    """Renders conversations. Immutable after `load`, so threads may share it.

    source: the default template's text, None for a model without one.
    adds_special_tokens: whether the prompt is to be encoded with special tokens added (no template does it).
    """

    def __init__(self, sources: dict[str, str], tokens: dict[str, str] | None = None) -> None:
        sandbox = self._sandbox = environment()
        try:
            self._templates = {name: sandbox.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise ModelFilesError(f"The chat template is not valid: {error}") from error
        if sources and "default" not in sources:
            raise ModelFilesError(f"The model has chat templates ({', '.join(sources)}), but no default.")
        self.source = sources.get("default")
        self.adds_special_tokens = not sources
        self._tokens = tokens or {}
        self._defaults: dict[str, Any] = {}
        self._takes_late_system = bool(sources) and self._renders_late_system_in_place()

    @classmethod
    def load(cls, model_dir: Path, override: str | None = None, use_default: bool = False) -> ChatTemplate:
        """The model's template, or `override` (a template's text, or the path of its file) in its place.

        use_default: ChatML for a model without one. Raises ModelFilesError.
        """
        config = read_json(model_dir / "tokenizer_config.json")
        tokens = special_tokens(read_json(model_dir / "special_tokens_map.json") | config)
        try:
            sources = {"default": _override(override)} if override else _model_sources(model_dir, config)
        except (OSError, UnicodeDecodeError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ModelFilesError(f"The model's chat template can't be read: {why}") from error
        if not sources and config.get("chat_template_type"):
            raise ModelFilesError(
                f"The model's chat template is a program ({config['chat_template_type']}), not a template; "
                "give a Jinja template with --chat-template."
            )
        if not sources and use_default:
            sources = {"default": CHATML}
        return cls(sources, tokens)

    def with_defaults(self, kwargs: dict[str, Any]) -> ChatTemplate:
        """The same template with more names in its scope, which a request may set otherwise."""
        other = copy.copy(self)
        other._defaults = self._defaults | kwargs
        return other

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool = True,
        kwargs: dict[str, Any] | None = None,
        role_mapping: dict[str, str] | None = None,
    ) -> str:
        """The prompt's text. `role_mapping`: mlx_lm.server's, for models without a template.

        A conversation that the template refuses is mended where joining or relabelling turns can do it.
        Raises PenstockError: TEMPLATE with the template's own words, INVALID_FIELD, UNSUPPORTED_FIELD.
        """
        turns = normalise(messages)
        if not self._templates:
            return plain_dialogue(turns, role_mapping)
        scope = {key: value for key, value in (kwargs or {}).items() if _may_set(key)}
        scope |= {"tools": tools or None, "add_generation_prompt": add_generation_prompt}
        attempts = [tag_late_systems(turns), join_turns(turns)]
        if self._takes_late_system or not any(turn["role"] == "system" for turn in turns[1:]):
            attempts.insert(0, turns)
        refusals = []
        with self._sandbox.limited():
            for number, attempt in enumerate(attempts):
                if attempt not in attempts[:number]:
                    try:
                        return self._render(attempt, scope)
                    except PenstockError as error:
                        refusals.append(error)
        raise refusals[0]

    def _render(self, messages: list[Message], scope: dict[str, Any]) -> str:
        name = "tool_use" if scope.get("tools") is not None and "tool_use" in self._templates else "default"
        scope = {"documents": None, **self._tokens, **self._defaults, **scope, "messages": messages}
        parts, size = [], 0
        try:
            for part in self._templates[name].generate(scope):
                size += len(part)
                if size > MAX_RENDERED:
                    raise SecurityError("the prompt is too large")
                parts.append(part)
        except Exception as error:  # a template is a program: it may fail in any way
            words = str(error) or type(error).__name__
            raise PenstockError(Kind.TEMPLATE, f"The chat template refused: {words[:500]}") from error
        return "".join(parts)

    def _renders_late_system_in_place(self) -> bool:
        # Some templates refuse a late system message, some drop it, some hoist it to the front, which would
        # change the prefix each time that one is added.
        probe = [
            {"role": "user", "content": "probe-first"},
            {"role": "assistant", "content": "probe-answer"},
            {"role": "system", "content": "probe-late"},
            {"role": "user", "content": "probe-last"},
        ]
        try:
            with self._sandbox.limited():
                text = self._render(probe, {"tools": None, "add_generation_prompt": True})
        except PenstockError:
            return False
        return text.find("probe-answer") < text.find("probe-late") < text.find("probe-last")


def _may_set(key: str) -> bool:
    return key.isidentifier() and not key.startswith("_") and key not in RESERVED


def _override(override: str) -> str:
    if "{" in override:
        return override
    try:
        return Path(override).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"--chat-template is neither a template nor a file: {error}") from error


def _model_sources(model_dir: Path, config: dict[str, Any]) -> dict[str, str]:
    """name → template: of the files in the order in which `transformers` prefers them."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        extra = sorted((model_dir / "additional_chat_templates").glob("*.jinja"))
        named = {"default": file, **{path.stem: path for path in extra}}
        return {name: path.read_text(encoding="utf-8") for name, path in named.items()}
    source = config.get("chat_template") or read_json(model_dir / "chat_template.json").get("chat_template")
    if isinstance(source, str):
        return {"default": source}
    return {one["name"]: one["template"] for one in source} if isinstance(source, list) else {}
