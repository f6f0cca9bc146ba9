"""From a request's fields to what the engine is told: refusals, defaults, sampling. Pure.

A value comes from the request, else the command line, else the model's generation_config, else it is
mlx_lm.server's. A field whose feature we lack is refused by name if ignoring it would change the answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from penstock import wire
from penstock.api.generation import Plan
from penstock.api.schema import Sampled
from penstock.errors import Kind, PenstockError
from penstock.sizes import gigabytes
from penstock.supervisor.ticket import Job
from penstock.text.assembler import Assembler

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: its inverse would overflow half precision."""
_LIMITS = {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0, "top_k": 1e9, "repetition_penalty": 100.0}


UNSUPPORTED: dict[str, tuple[Collection[Any], str]] = {
    "adapters": ((None,), "adapters can't be chosen by a request."),
    "draft_model": ((None, "default_model"), "draft models are not supported."),
    "functions": ((None, []), "use tools instead."),
    "function_call": ((None, "auto", "none"), "use tools instead."),
    "modalities": ((None, [], ["text"]), "only ['text'] is supported."),
    "echo": ((None, False), "echoing the prompt is not supported."),
    "suffix": ((None, ""), "filling in before a suffix is not supported."),
    "parse_special": ((None, True), "special tokens in a text are always read as such."),
    "with_pieces": ((None, False), "tokens are given as ids only."),
    "return_token_strs": ((None, False), "tokens are given as ids only."),
    "best_of": ((None, 1), "only 1 is supported; n gives several answers."),
}
"""What a field may hold whose feature we lack, and what is said of the rest."""


def invalid(param: str, message: str) -> PenstockError:
    """A 400 that names the field."""
    return PenstockError(Kind.INVALID_FIELD, f"{param}: {message}", param=param)


def flattened(error: PenstockError, names: Mapping[str, str]) -> PenstockError:
    """The error in the words of an API that is flat where chat is not; `names`: chat's → its own."""
    param = said = error.param or ""
    for theirs, ours in {**names, ".json_schema": "", ".function": ""}.items():
        param = param.replace(theirs, ours)
    error.message = error.message.replace(f"{said}:", f"{param}:", 1)
    error.param = param or None
    return error


def unsupported(param: str, message: str) -> PenstockError:
    """A 400 that names what is not done here."""
    return PenstockError(Kind.UNSUPPORTED_FIELD, f"{param}: {message}", param=param)


def refuse(request: Sampled) -> None:
    """Raise UNSUPPORTED_FIELD for what would change the answer and isn't done."""
    for param, (accepted, message) in UNSUPPORTED.items():
        value = getattr(request, param, None)
        if value not in accepted or type(value) not in map(type, accepted):  # 0 is not false
            raise unsupported(param, message)


def check_model(model: str | None, served: Sequence[str], strict: bool) -> None:
    """Raises MODEL_NOT_FOUND if names are strict and this one isn't served."""
    if strict and model is not None and model not in served:
        raise PenstockError(
            Kind.MODEL_NOT_FOUND, f"The model {model[:200]!r} is not served here.", param="model"
        )


def chosen_defaults(flags: Mapping[str, float | None], config: Mapping[str, Any]) -> dict[str, float]:
    """What holds for requests that name no value: flag, else generation_config, else mlx_lm.server's."""
    values: dict[str, float] = {
        "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 0.0
    }  # fmt: skip
    for name, limit in _LIMITS.items():
        value = config.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= limit:
            values[name] = value
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    elif config.get("do_sample") is True and config.get("temperature") is None:
        values["temperature"] = 1.0  # what the file's own reader takes
    values.update({name: value for name, value in flags.items() if name in _LIMITS and value is not None})
    return values


def sampling(request: Sampled, defaults: Mapping[str, float], vocab_size: int, context: int) -> wire.Sampling:
    """How ids are drawn. `context` (tokens) bounds the penalties' windows. Raises INVALID_FIELD."""

    def chosen(name: str) -> float:
        value = getattr(request, name)
        return defaults[name] if value is None else value

    def window(size: int | None) -> int:
        return 20 if size is None else min(size, context)

    temperature = chosen("temperature")
    return wire.Sampling(
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=chosen("top_p"),
        top_k=min(max(int(chosen("top_k")), 0), vocab_size),
        min_p=chosen("min_p"),
        xtc_probability=request.xtc_probability or 0.0,
        xtc_threshold=0.1 if request.xtc_threshold is None else request.xtc_threshold,
        repetition_penalty=chosen("repetition_penalty") or 1.0,
        repetition_context_size=window(request.repetition_context_size),
        presence_penalty=request.presence_penalty or 0.0,
        presence_context_size=window(request.presence_context_size),
        frequency_penalty=request.frequency_penalty or 0.0,
        frequency_context_size=window(request.frequency_context_size),
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        logprobs=_logprobs(request),
    )


def _logprobs(request: Sampled) -> int | None:
    asked = getattr(request, "logprobs", None)
    if asked is not None and not isinstance(asked, bool):
        return int(asked)
    if request.top_logprobs is not None and request.top_logprobs > 0:
        return request.top_logprobs
    return 0 if asked else None


def _logit_bias(biases: dict[str, float], vocab_size: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise invalid("logit_bias", f"keys must be token ids below {vocab_size}, not {key[:40]!r}.")
        found[int(key)] = bias
    return found


def stops(request: Sampled) -> list[str]:
    """The stop strings, each once."""
    if request.stop is None:
        return []
    return [request.stop] if isinstance(request.stop, str) else list(dict.fromkeys(request.stop))


def check_ids(ids: Sequence[int], vocab_size: int, path: str) -> array[int]:
    """A prompt given as ids. Raises INVALID_FIELD naming the first that is none."""
    try:
        packed = array("I", ids)
    except (OverflowError, TypeError):
        packed = None
    if packed is None or (packed and max(packed) >= vocab_size):
        at = next(at for at, id in enumerate(ids) if not 0 <= id < vocab_size)
        raise invalid(f"{path}[{at}]", f"token ids are from 0 to {vocab_size - 1}.")
    return packed


def check_length(length: int, ready: wire.Ready, param: str) -> None:
    """A prompt must leave room for one token. Raises CONTEXT_LENGTH with both numbers and what decides."""
    most = ready.max_model_len
    if length + 1 <= most:
        return
    why = ""
    if most < ready.context_length:
        why = (
            f" The model itself takes {ready.context_length}; the memory that may be used here "
            f"({gigabytes(ready.ceiling)}, {ready.decided_by}) holds no more."
        )
    raise PenstockError(
        Kind.CONTEXT_LENGTH,
        f"This model's maximum context length is {most} tokens, but the prompt has {length} tokens.{why} "
        "Please shorten it.",
        param=param,
        sizes=(length, most),
    )


def most_tokens(request: Sampled, flag: float | None, context: int) -> int | None:
    """The cap on an answer's length in tokens, or None: until the context ends."""
    named = request.max_completion_tokens or request.max_tokens or flag
    return None if named is None else min(int(named), context)


def job(
    request: Sampled,
    flags: Mapping[str, float | None],
    ready: wire.Ready,
    sampling: wire.Sampling,
    ids: array[int],
    param: str,
) -> Job:
    """What the engine is to do with the prompt that came in field `param`. Raises CONTEXT_LENGTH."""
    check_length(len(ids), ready, param)
    return Job(
        prompt=ids,
        sampling=sampling,
        n=request.n or 1,
        max_tokens=most_tokens(request, flags.get("max_tokens"), ready.context_length),
        min_tokens=min(request.min_tokens or 0, ready.context_length),
        ignore_eos=bool(request.ignore_eos),
        stops=bool(stops(request)),
        seed=request.seed,
    )


def plan(
    request: Sampled,
    jobs: list[Job],
    assembler: Callable[[], Assembler],
    retained: int = 0,
    in_reasoning: bool = False,
) -> Plan:
    """What is left of a request once its prompts are ids."""
    options = request.stream_options
    return Plan(
        jobs=jobs,
        assembler=assembler,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        return_progress=bool(request.return_progress),
        retained=retained,
        in_reasoning=in_reasoning,
    )
