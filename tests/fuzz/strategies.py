"""Input for the fuzzer: JSON of any kind, requests that are almost right, text that parsers know, bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, 1, -1, 2, 17, 255, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324])
TEXTS = st.sampled_from(
    ["", " ", "\x00", "a" * 5000, "\u200d\ufeff", "👩‍👧", "<|im_end|>", "<think>", "</think>", "<tool_call>",
     "{{ messages }}", "{% for x in y %}", "\\ud800", "user", "assistant", "system", "tool", "developer", 
     "auto", "function", "text", "image_url", "required", "json_schema", "json_object", "../../etc/passwd",
     "http://127.0.0.1"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), NUMBERS, st.floats(), st.text(max_size=12), TEXTS
)
LIKE: dict[type, st.SearchStrategy[Any]] = {
    int: st.one_of(NUMBERS, st.integers(-3, 300), st.integers()),
    float: st.one_of(NUMBERS, st.floats()),
    str: st.one_of(TEXTS, st.text(max_size=12)),
    bool: st.booleans(),
}
KEYS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["role", "content", "type", "text", "name", "id", "function", "arguments", "parameters", "properties",
         "tool_calls", "tool_call_id", "$ref", "anyOf", "schema", "stream", "n", "stop", "model", "thinking",
         "reasoning_content", "input", "items", "additionalProperties", "pattern", "enum", "tool_choice"]
    ),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)

_FUNCTION = {
    "name": "look",
    "description": "looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "far": {"type": "integer"}}},
}
_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "42"},
    {"role": "user", "content": "And?"},
]
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "max_tokens": 9, "n": 2,
             "stop": ["END"], "logit_bias": {"65": 2.0}, "presence_penalty": 0.5}  # fmt: skip
_BLOCKS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"},
                                      {"type": "tool_use", "id": "t1", "name": "look", "input": {}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "42"},
                                 {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}}]},
]  # fmt: skip
_ASKED = {"messages": _BLOCKS, "system": [{"type": "text", "text": "Be brief."}],
          "tools": [{"name": "look", "input_schema": _FUNCTION["parameters"]}]}  # fmt: skip
_ITEMS = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
    {"role": "user", "content": "Hello"},
    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "plain:hm"},
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"at": "x"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "42"},
]
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": _TALK, "tools": [{"type": "function", "function": _FUNCTION}], **_SAMPLING},
        {"messages": _TALK[1:2], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True,
         "top_logprobs": 2, "return_progress": True, "tool_choice": "auto", "reasoning_effort": "low"},
        {"messages": _TALK[1:2], "response_format": {"type": "json_schema", "json_schema": {
            "name": "s", "strict": True, "schema": _FUNCTION["parameters"]}}},
    ],
    "/v1/completions": [
        {"prompt": "Once", "logprobs": 2, **_SAMPLING},
        {"prompt": [[65, 66], [67]], "stream": True, "max_tokens": 4},
    ],
    "/v1/messages": [
        {**_ASKED, "max_tokens": 9, "stop_sequences": ["END"], "thinking": {"type": "enabled"}},
        {**_ASKED, "max_tokens": 9, "stream": True, "tool_choice": {"type": "auto"}, "top_k": 3},
    ],
    "/v1/messages/count_tokens": [_ASKED],
    "/v1/responses": [
        {"input": _ITEMS, "instructions": "Be brief.", "tools": [{"type": "function", **_FUNCTION}],
         "max_output_tokens": 9, "reasoning": {"effort": "low"}, "store": False,
         "include": ["reasoning.encrypted_content"]},
        {"input": "Hello", "stream": True, "text": {"format": {"type": "text"}}, "tool_choice": "auto",
         "tools": [{"type": "namespace", "name": "all", "tools": [{"type": "function", **_FUNCTION}]}]},
    ],
    "/tokenize": [
        {"content": "Hello", "add_special": True},
        {"messages": _TALK, "chat_template_kwargs": {"thinking": True}},
    ],
    "/detokenize": [{"tokens": [72, 105, 256]}],
}  # fmt: skip


_PATTERNS = ["^a+$", "(a+)+$", "[", "(?=x)y", "\\d{1000}", "(a|b){200}", ".{0,5000}", "^([a-z]{1,63}\\.)+$"]
_KEYWORDS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null", "x"]),
    "enum": st.lists(SCALARS, max_size=4),
    "const": SCALARS,
    "pattern": st.sampled_from(_PATTERNS) | st.text(max_size=8),
    "format": st.sampled_from(["date-time", "email", "uuid", "ipv4", "uri", "x"]),
    "required": st.lists(KEYS, max_size=3),
    "$ref": st.sampled_from(["#", "#/$defs/a", "#/$defs/none", "#/properties/a", "http://127.0.0.1/x"]),
    **dict.fromkeys(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"],
                    st.one_of(st.integers(-1, 9), st.sampled_from([1000, 10**6, 2**31, 2**64]))),
    **dict.fromkeys(["minimum", "maximum", "exclusiveMinimum", "multipleOf"], NUMBERS | st.floats()),
    **dict.fromkeys(["uniqueItems", "additionalProperties", "nullable"], st.booleans()),
}  # fmt: skip


def _schema(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(KEYS, inner, max_size=4)
    several = st.lists(inner, max_size=4)
    nested = {
        **dict.fromkeys(["properties", "$defs", "patternProperties", "definitions"], named),
        **dict.fromkeys(["anyOf", "oneOf", "allOf", "prefixItems"], several),
        **dict.fromkeys(["items", "additionalProperties", "not", "contains"], inner),
    }
    return st.fixed_dictionaries({}, optional={**_KEYWORDS, **nested}) | JSON


SCHEMAS = st.recursive(st.fixed_dictionaries({}, optional=_KEYWORDS) | st.booleans(), _schema, max_leaves=8)
"""JSON schemas that make sense, and such that don't."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


@st.composite
def bent(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """`whole` with up to three places exchanged (for their like, or anything), lost, doubled or added to."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 2, 3]))):
        place = draw(st.sampled_from(_places(value)[1:] or [()]))
        if not place:
            break
        parent = value
        for step in place[:-1]:
            parent = parent[step]  # type: ignore[index]
        change = draw(st.sampled_from(["alike"] * 4 + ["exchange", "lose", "double", "add", "rename"]))
        if change == "alike" and type(parent[place[-1]]) in LIKE:
            parent[place[-1]] = draw(LIKE[type(parent[place[-1]])])
        elif change == "lose":
            del parent[place[-1]]
        elif change == "double" and isinstance(parent, list):
            parent += [copy.deepcopy(parent[place[-1]])] * draw(st.sampled_from([1, 20, 200]))
        elif change == "rename" and isinstance(parent, dict):
            parent[draw(KEYS)] = parent.pop(place[-1])
        elif change == "add" and isinstance(parent, dict):
            parent[draw(KEYS)] = draw(JSON)
        else:
            parent[place[-1]] = draw(JSON)
    return value


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """The body of a request to `path`: right, almost right, any JSON, or bytes that were JSON once."""
    kind = draw(st.sampled_from(["bent"] * 6 + ["json", "broken", "bytes"]))
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    value = draw(JSON) if kind == "json" else draw(bent(draw(st.sampled_from(REQUESTS[path]))))
    # Hypothesis' text has no surrogates; as escapes they come in here.
    text = json.dumps(value, ensure_ascii=draw(st.booleans())).replace("\\\\ud800", "\\ud800")
    body = text.encode("utf-8", "surrogatepass")
    if kind == "broken":
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(body)))
            body = body[:at] + draw(st.binary(max_size=4)) + body[at + draw(st.integers(0, 6)) :]
    return body


@st.composite
def spoken(draw: st.DrawFn, marks: list[str]) -> str:
    """What a model could write, by pieces: a parser's marks, JSON, words, and runs that regexes dislike."""
    piece = st.one_of(
        st.sampled_from(marks or [""]),
        st.sampled_from(["{", "}", "[", "]", '"', "'", ",", ":", "=", "(", ")", "<", ">", "/", "\\", "\n",
                         "name", "arguments", "look", "at", "null", "true", "1e999", "NaN", "\x00"]),
        JSON.map(json.dumps),
        st.text(max_size=6),
        st.builds(lambda text, count: text * count,
                  st.sampled_from([" ", "a", "<", "[", "{", "(", "-", "\n", '"', "'", "\\", "=", "1+"]),
                  st.sampled_from([3, 50, 2000])),
    )  # fmt: skip
    return "".join(draw(st.lists(piece, max_size=14)))


@st.composite
def wire_bytes(draw: st.DrawFn) -> bytes:
    """HTTP as bytes: a request that is right, with lines and bytes exchanged."""
    path = draw(
        st.sampled_from([*REQUESTS, "/v1/models", "/health", "/", "*", "//", "/%00", "/v1/models/%ff"])
    )
    body = draw(bodies(path)) if path in REQUESTS else b""
    lines = [
        f"{draw(st.sampled_from(['POST', 'GET', 'HEAD', 'OPTIONS', 'PUT', 'PRI', 'x', '']))} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {draw(st.sampled_from([len(body)] * 4 + [0, -1, 10**12, len(body) + 1]))}",
        *draw(st.lists(st.sampled_from([
            "Transfer-Encoding: chunked", "Connection: close", "Connection: upgrade", "Upgrade: websocket",
            "Expect: 100-continue", "Content-Length: 3", "Host: evil.example", "Origin: null", ": x", "X:",
            "Authorization: Bearer \xff", "X-Request-Id: a\x00b", "Content-Encoding: gzip",
        ]), max_size=3)),
    ]  # fmt: skip
    head = "\r\n".join(lines).encode("latin-1")
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(head)))
        head = head[:at] + draw(st.binary(max_size=3)) + head[at + draw(st.integers(0, 3)) :]
    return head + draw(st.sampled_from([b"\r\n\r\n"] * 4 + [b"\n\n", b"\r\n", b""])) + body
