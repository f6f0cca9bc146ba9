"""Every option, once: its name, default, form and meaning.

The flags, the variables PENSTOCK_*, the keys of the TOML file, `--print-config` and docs/options.md all
come from the fields below. An option set in several places: flag over variable over file over default.
All values arrive as text and pass one parser, so an option means the same wherever it is set.
Refuses: reading anything but what it is handed, and any option not listed here.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from penstock.sizes import parse_size, physical_memory

PREFIX = "PENSTOCK_"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
LOG_FORMATS = ("text", "json")


class ConfigError(ValueError):
    """An option that cannot be used as it is set. The message is one sentence that names it."""


@dataclass(frozen=True, slots=True)
class Form:
    """How an option is written: `parse` raises ValueError for text that is not as `expects` says."""

    metavar: str
    expects: str
    parse: Callable[[str], Any]
    many: bool = False


def _number(cast: Callable[[str], Any], low: float, high: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = cast(text)
        if not low <= value <= high:  # also refuses NaN
            raise ValueError
        return value

    return parse


def _whole(low: int, high: int | None = None) -> Form:
    expects = f"a whole number from {low} to {high}" if high is not None else f"a whole number from {low} up"
    return Form("N", expects, _number(int, low, math.inf if high is None else high))


def _real(low: float, high: float | None = None) -> Form:
    expects = f"a number from {low:g} to {high:g}" if high is not None else f"a number from {low:g} up"
    return Form("X", expects, _number(float, low, 1e9 if high is None else high))


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError
    return word in ("1", "true", "yes", "on")


def _level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError
    return text.upper()


def _format(text: str) -> str:
    if text.lower() not in LOG_FORMATS:
        raise ValueError
    return text.lower()


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _size(text: str) -> int:
    return parse_size(text, whole=physical_memory() or None)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _keys(text: str) -> tuple[str, ...]:
    keys = tuple(word.strip() for word in text.split(","))
    if not all(KEY.fullmatch(key) for key in keys):
        raise ValueError
    return keys


KEY = re.compile(r"[!-+\--~]+")
"""What an API key may be: visible ASCII without the comma, so that it stands in a header and in a list."""
TEXT = Form("TEXT", "text", str)
LIST = Form("A,B", "a comma-separated list", _words, many=True)
KEYS = Form("KEY", "a key of visible ASCII characters, or several with commas between them", _keys, many=True)
SWITCH = Form("", "true or false", _boolean)
SIZE = Form("SIZE", "a size such as 8G, 512MB, 8GiB or 75% (of this machine's memory)", _size)
MINUTES = Form("MINUTES", "a number of minutes from 0.01 up", _number(float, 0.01, 1e6))
JSON = Form("JSON", "a JSON object", _object)
LEVEL = Form("LEVEL", "one of " + ", ".join(LOG_LEVELS), _level)
FORMAT = Form("FORMAT", "one of " + ", ".join(LOG_FORMATS), _format)

NOT_YET = "this is not supported yet"
MODEL, SERVER, SAMPLING, BATCH, MEMORY, LATER = "Model", "Server", "Sampling", "Batching", "Memory", "Not yet"


def _option(group: str, form: Form, default: Any, meaning: str, **extra: Any) -> Any:
    """A field of `Options`. `meaning` goes to --help and the docs; `unset` says what None means."""
    metadata = {"group": group, "form": form, "help": meaning, **extra}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata, repr="secret" not in extra)


_FALL_BACK = "the model's generation_config.json, else "


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything `penstock serve` can be told. None means 'not set'; the docs say what then holds."""

    model: str | None = _option(
        MODEL, TEXT, None, "The model to serve: a local directory, or the name of a repository on the hub."
    )
    demo: bool = _option(MODEL, SWITCH, False, "Serve the small bundled demo model: nothing is downloaded.")
    served_model_name: tuple[str, ...] = _option(
        MODEL,
        LIST,
        (),
        "A name for the model in /v1/models and responses; may be given more than once.",
        unset="the model as it was named",
    )
    strict_model_names: bool = _option(
        MODEL, SWITCH, False, "Answer a request that names another model with 404 instead of serving it."
    )
    trust_remote_code: bool = _option(
        MODEL,
        SWITCH,
        False,
        "Let a model repository run Python code of its own. Only for code you have read.",
    )
    chat_template: str = _option(
        MODEL, TEXT, "", "A chat template (its text, in Jinja) instead of the model's.", unset="the model's"
    )
    use_default_chat_template: bool = _option(
        MODEL, SWITCH, False, "Use a plain ChatML template when the model brings none."
    )
    chat_template_args: Mapping[str, Any] = _option(
        MODEL, JSON, {}, "Arguments for every chat template, such as '{\"enable_thinking\": false}'."
    )
    host: str = _option(
        SERVER,
        TEXT,
        "127.0.0.1",
        "The address to listen on. Other than loopback only with an API key, or --keyless.",
    )
    port: int = _option(SERVER, _whole(0, 65535), 8080, "The port to listen on; 0 takes a free one.")
    api_key: tuple[str, ...] = _option(
        SERVER,
        KEYS,
        (),
        "A key that clients must send as a bearer token; may be given more than once. Each key has a prompt "
        "cache of its own. Set in the environment or a file, it does not show in process lists.",
        unset="no key is asked for",
        secret=True,
    )
    api_key_file: str | None = _option(
        SERVER, TEXT, None, "A file with more keys, one a line; lines that begin with '#' are comments."
    )
    keyless: bool = _option(
        SERVER, SWITCH, False, "Let everybody use the server who can reach a --host other than loopback."
    )
    allowed_hosts: tuple[str, ...] = _option(
        SERVER,
        LIST,
        (),
        "Host names, besides this machine's loopback names and --host, that requests may name.",
    )
    allowed_origins: tuple[str, ...] = _option(
        SERVER, LIST, (), "Web origins that a browser may call from (CORS); '*' for any.", unset="none"
    )
    drain_timeout: float = _option(
        SERVER, _real(0), 30.0, "Seconds that running requests are given to end after SIGTERM or Ctrl-C."
    )
    log_level: str = _option(SERVER, LEVEL, "INFO", "How much is logged to stderr.")
    log_format: str = _option(
        SERVER,
        FORMAT,
        "text",
        "Lines for people, or a JSON object a line, with a request's figures as fields.",
    )
    temp: float | None = _option(
        SAMPLING,
        _real(0),
        None,
        "Temperature of requests that name none; 0 is greedy.",
        unset=_FALL_BACK + "0",
    )
    top_p: float | None = _option(
        SAMPLING, _real(0, 1), None, "top_p of requests that name none.", unset=_FALL_BACK + "1"
    )
    top_k: int | None = _option(
        SAMPLING, _whole(0), None, "top_k of requests that name none; 0 is off.", unset=_FALL_BACK + "0"
    )
    min_p: float | None = _option(
        SAMPLING, _real(0, 1), None, "min_p of requests that name none; 0 is off.", unset=_FALL_BACK + "0"
    )
    max_tokens: int | None = _option(
        SAMPLING,
        _whole(1),
        None,
        "Most tokens generated for a request that names no limit.",
        unset="until the model's context ends",
    )
    decode_concurrency: int = _option(BATCH, _whole(1), 32, "The most sequences in one decode step.")
    prompt_concurrency: int = _option(BATCH, _whole(1), 8, "The most prompts being prefilled at a time.")
    max_queue: int = _option(
        BATCH, _whole(1), 512, "The most requests that may wait; one more gets a 503 and Retry-After."
    )
    max_queue_tokens: int | None = _option(
        BATCH, _whole(1), None, "The most prompt tokens that may wait.", unset="any number"
    )
    max_wait: float | None = _option(
        BATCH, _real(0), None, "Seconds that a request may wait before it gets a 503.", unset="any time"
    )
    prefill_step_size: int = _option(
        BATCH, _whole(1), 2048, "The most prompt tokens computed in one step; the scheduler may take fewer."
    )
    stall_target_ms: float = _option(
        BATCH,
        _real(1),
        200.0,
        "How long, in milliseconds, a step's prefill may hold up streams that are running.",
    )
    memory_limit: int | None = _option(
        MEMORY,
        SIZE,
        None,
        "The most that the engine may hold: weights, KV of running requests, caches, buffers, all of it.",
        unset="what the device, cgroups, rlimits and physical memory allow, less a reserve",
    )
    hard_memory_limit: bool = _option(
        MEMORY,
        SWITCH,
        False,
        "Let Linux refuse the engine memory beyond its limit, so that a mistake ends the engine, which is "
        "started again, and not another process. CPU back end only.",
    )
    wire_weights: bool = _option(
        MEMORY, SWITCH, False, "Keep the weights resident on Metal. Nothing else is ever wired."
    )
    front_memory: int = _option(
        MEMORY,
        SIZE,
        1_000_000_000,
        "The most that the HTTP process holds of request bodies, token ids and "
        "unsent answers; requests beyond it get a 503, one that is too large by itself a 413.",
    )
    prompt_cache_size: int | None = _option(
        MEMORY, _whole(0), None, "The most sequences in the prompt cache; 0 turns it off.", unset="any number"
    )
    prompt_cache_bytes: int | None = _option(
        MEMORY,
        SIZE,
        None,
        "The most bytes in the prompt cache; 0 turns it off.",
        unset="what the memory holds beside running requests, which come first",
    )
    idle_release: float | None = _option(
        MEMORY, MINUTES, None, "Minutes without a request until the prompt cache is dropped.", unset="never"
    )
    idle_unload: float | None = _option(
        MEMORY,
        MINUTES,
        None,
        "Minutes without a request until the engine ends and its memory is free; the next request starts it.",
        unset="never",
    )
    adapter_path: str | None = _option(
        LATER, TEXT, None, "A directory with adapter weights.", refused=NOT_YET
    )
    draft_model: str | None = _option(
        LATER, TEXT, None, "A smaller model for speculative decoding.", refused=NOT_YET
    )
    num_draft_tokens: int = _option(LATER, _whole(1), 3, "Tokens drafted at a time; only with --draft-model.")
    pipeline: bool = _option(
        LATER, SWITCH, False, "Spread the model over machines by pipelining.", refused=NOT_YET
    )
    kv_bits: int | None = _option(
        LATER, _whole(1), None, "Bits per number of a quantised KV cache.", refused=NOT_YET
    )
    kv_group_size: int = _option(LATER, _whole(1), 64, "Group size of a quantised cache; with --kv-bits.")
    quantized_kv_start: int = _option(LATER, _whole(0), 5000, "First quantised position; with --kv-bits.")


def listed() -> tuple[Field[Any], ...]:
    """The fields of `Options`, in the order of the docs."""
    return fields(Options)


def default_of(option: Field[Any]) -> Any:
    """The option's value where nothing sets it."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def flag_of(option: Field[Any]) -> str:
    """The command-line flag of an option: '--max-tokens'."""
    return "--" + option.name.replace("_", "-")


def variable_of(option: Field[Any]) -> str:
    """The environment variable of an option: 'PENSTOCK_MAX_TOKENS'."""
    return PREFIX + option.name.upper()


@dataclass(frozen=True)
class Resolved:
    """The options in force, and for each that is not at its default where it was set."""

    options: Options
    sources: Mapping[str, str]


def resolve(
    flags: Mapping[str, str | None],
    environment: Mapping[str, str],
    file: Mapping[str, Any],
    file_name: str = "the config file",
) -> Resolved:
    """Merge the three places by precedence.

    `flags` maps field names to the text given (None: not given); `file` is the parsed TOML. Raises
    ConfigError for a value of the wrong form, or a key of the file that is no option.
    """
    known = {option.name for option in listed()}
    keys = {key.replace("-", "_"): key for key in file}
    for name, key in keys.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"{file_name}: {key!r} is not an option{hint}")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for option in listed():
        name = option.name
        if (text := flags.get(name)) is not None:
            rank, source = 0, flag_of(option)
        elif text := environment.get(variable_of(option)):
            rank, source = 1, variable_of(option)
        elif name in keys:
            text, rank, source = _as_text(file[keys[name]]), 2, f"{keys[name]!r} in {file_name}"
        else:
            continue
        values[name], sources[name], ranks[name] = _parsed(option, text, source), source, rank
    if values.get("demo") and "model" in values and ranks["demo"] != ranks["model"]:
        # They exclude each other, so the one set in the place that goes first stands.
        overridden = max("demo", "model", key=ranks.__getitem__)
        del values[overridden], sources[overridden]
    return Resolved(Options(**values), sources)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like options but are none: typing errors that would pass unseen."""
    known = {variable_of(option) for option in listed()} | {PREFIX + "CONFIG", PREFIX + "PRETEND"}
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def refusal(options: Options) -> str | None:
    """One sentence if an option asks for what this version does not do, else None."""
    for option in listed():
        if "refused" in option.metadata and getattr(options, option.name):
            return f"{flag_of(option)}: {option.metadata['refused']}."
    return None


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value)


def _parsed(option: Field[Any], text: str, source: str) -> Any:
    form: Form = option.metadata["form"]
    try:
        return form.parse(text)
    except (ValueError, OverflowError):
        shown = "" if option.metadata.get("secret") else f", not {text!r}"
        raise ConfigError(f"{source} must be {form.expects}{shown}.") from None
