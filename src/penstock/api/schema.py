"""The request bodies of the OpenAI endpoints, as msgspec structs: the one description of what is accepted.

Ranges and lengths stand here, so that the decoder checks them, names the field, and /openapi.json shows them.
Unknown fields pass; null means absent. What depends on the model (ids, context) is checked in `params`.
Fields that are declared only to be refused by name are typed `Any`; `params.refuse` says why.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_LENGTH = 4096
MAX_TOP_LOGPROBS = 20
MAX_TOOLS_SIZE = 4_000_000
UNSEEN = "[an image, which this model cannot see]"
"""What a tool's result holds for an image: a refusal would be met again in every turn that follows."""

Share = Annotated[float, Meta(ge=0, le=1)]
LARGEST = 2**63 - 1
Count = Annotated[int, Meta(ge=0)]
Some = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-100, le=100)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(Struct):
    include_usage: bool | None = None


class SchemaFormat(Struct):
    """strict: a keyword that can't be enforced is an error, and not ignored."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """`schema` beside `json_object` is llama.cpp's spelling."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None
    schema: dict[str, Any] | None = None


class Asked(Struct, kw_only=True):
    """What all requests have in common."""

    model: str | None = None

    @classmethod
    def readable(cls, raw: Any) -> Any:
        """What of a body, still plain, is to be of the types here."""
        return raw


class Sampled(Asked, kw_only=True):
    """What chat and text completions share. Defaults (None) are resolved by `params.sampling`."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    max_tokens: Some | None = None
    max_completion_tokens: Some | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-LARGEST, le=LARGEST)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Share | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0, le=100)] | None = None
    repetition_context_size: Count | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: Count | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: Count | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Meta(ge=-1e6, le=1e6)]], Meta(max_length=1024)] | None
    ) = None
    top_logprobs: Annotated[int, Meta(ge=-1, le=MAX_TOP_LOGPROBS)] | None = None
    num_draft_tokens: Count | None = None
    adapters: Any = None
    draft_model: Any = None
    response_format: ResponseFormat | None = None


class ContentPart(Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Struct):
    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(Struct):
    function: CalledFunction
    id: str | None = None
    type: str | None = None


class Message(Struct):
    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None


class Function(Struct):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """Tools of other types than `function` are left out of the prompt, as clients expect."""

    type: str | None = None
    function: Function | None = None


class FunctionName(Struct):
    name: str


class NamedChoice(Struct):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampled, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    role_mapping: dict[str, str] | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: bool | Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Any = None
    suffix: Any = None
    best_of: Any = None
