"""What is fuzzed: each target draws one input, and raises if anything but a refusal comes of it.

A target runs under an alarm, so that what hangs is found with its input, also inside a regular expression.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import pkgutil
import re
import signal
import socket
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llguidance
import msgspec
from hypothesis import strategies as st
from tests.fuzz.in_process import Application, check_answer
from tests.fuzz.strategies import JSON, REQUESTS, SCHEMAS, bent, bodies, spoken, wire_bytes
from tests.support import chat_templates, tiny_tokenizers
from tests.support.fake_backend import SPECIALS, VOCAB, Server, say, text_parts, wait_until
from tests.support.raw_http import parsed, received

from penstock.api import anthropic
from penstock.api.chat import function_tools
from penstock.api.protocol import Bounds
from penstock.api.schema import ChatRequest
from penstock.errors import PenstockError
from penstock.text import grammar, tools
from penstock.text.assembler import Assembler, Delta
from penstock.text.detokenizer import Detokenizer
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

HANGS = 20.0
"""Processor time of this process that one input may take, in seconds."""


@contextlib.contextmanager
def alarm(seconds: float = HANGS) -> Iterator[None]:
    """AssertionError in what takes longer, by processor time: a loaded machine is no hang."""

    def expired(*_: object) -> None:
        raise AssertionError(f"still at work after {seconds} s")

    faulthandler.dump_traceback_later(20 * seconds, exit=True)  # for what no signal reaches
    before = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


@cache
def application() -> Application:
    return Application()


@cache
def server() -> Server:
    return Server(say("fine"), bounds=Bounds(headers=0.5, body_look=0.5, linger=0.5)).start()


IDS = st.lists(st.one_of(st.integers(0, VOCAB - 1), st.integers(256, VOCAB - 1)), max_size=40)


def requests(draw: st.DrawFn) -> None:
    """Bodies to every endpoint; answers of any ids."""
    path = draw(st.sampled_from(sorted(REQUESTS)))
    body = draw(bodies(path))
    application().says = draw(IDS)
    check_answer(path, *application().post(path, body))


def connections(draw: st.DrawFn) -> None:
    """Bytes to a port: answered as HTTP or closed, and the next request is served."""
    sent = draw(wire_bytes())
    with socket.create_connection(("127.0.0.1", server().port), timeout=60) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    if answer:
        status = parsed(answer)[0]
        assert status in (100, 200, 204) or 400 <= status < 500, answer[:500]
    with server().client() as client:
        assert client.get("/health").status_code == 200
    wait_until(lambda: server().service.admission.open == 0)


@cache
def formats() -> dict[str, tuple[tools.ToolFormat, list[str]]]:
    """Every parser, with the marks that its source names."""
    tools.tool_format("json_tools")  # loads the package
    package = __import__("_penstock_tool_parsers")
    found = {}
    for name in [module.name for module in pkgutil.iter_modules(package.__path__)] + ["harmony"]:
        form = tools.tool_format(name)
        path = f"{package.__path__[0]}/{name}.py"
        source = "" if name == "harmony" else Path(path).read_text(encoding="utf-8")
        marks = re.findall(r'"([^"\n]*[<\[|:{][^"\n]*)"', source)
        found[name] = form, [*dict.fromkeys([form.start, form.end, *marks])]
    return found


def calls(draw: st.DrawFn) -> None:
    """Text between a call's marks: calls with JSON arguments, or None."""
    name = draw(st.sampled_from(sorted(formats())))
    form, marks = formats()[name]
    schemas = draw(
        st.none() | st.just(REQUESTS["/v1/chat/completions"][0]["tools"]) | st.lists(JSON, max_size=2)
    )
    text = draw(spoken(marks))
    with alarm():
        for call in form.parse(text, tools.usable_schemas(schemas), 0) or ():
            assert call.name
            assert isinstance(json.loads(call.arguments), dict)
            msgspec.json.encode([call.name, call.id, call.arguments])


def _answer(assembler: Assembler, ids: list[int], cuts: list[int], reason: str) -> tuple[Delta, str]:
    whole = Delta()
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        part = assembler.feed(ids[start:end])
        whole.content += part.content
        whole.reasoning += part.reasoning
        whole.tool_calls += part.tool_calls
    rest, reason = assembler.finish(reason)
    whole.content += rest.content
    whole.reasoning += rest.reasoning
    whole.tool_calls += rest.tool_calls
    return whole, reason


def answers(draw: st.DrawFn) -> None:
    """Ids to an answer: the same in whatever parts they come; without marks and stops nothing is lost."""
    text = text_parts()
    name = draw(st.sampled_from(sorted(formats())))
    form, marks = formats()[name]
    ids = draw(
        IDS
        | spoken([*marks, *SPECIALS]).map(
            lambda said: list(text.tokenizer.encode(said, add_special_tokens=False))
        )
    )
    stops = draw(st.lists(st.text(min_size=1, max_size=3) | st.sampled_from(SPECIALS), max_size=3))
    split = draw(st.booleans())
    fields: dict[str, Any] = {"stops": stops, "in_reasoning": draw(st.booleans())}
    if split:
        fields |= {"reasoning": text.reasoning, "tools": form}
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    reason = draw(st.sampled_from(["stop", "length", "cut"]))
    with alarm():
        once, how = _answer(Assembler(text.tokenizer, **fields), ids, [], reason)
        parts, how_too = _answer(Assembler(text.tokenizer, **fields), ids, cuts, reason)
        said = [
            (d.content, d.reasoning, [(c.name, c.arguments) for c in d.tool_calls]) for d in (once, parts)
        ]
        assert said[0] == said[1]
        assert how == how_too
        msgspec.json.encode(said)
        if not split and not stops:
            plain = [id for id in ids if id not in text.tokenizer.control_ids]
            assert once.content == bytes(b"".join(map(text.tokenizer.token_bytes, plain))).decode(
                "utf-8", "replace"
            )


@cache
def tokenizers() -> list[Tokenizer]:
    tiny = tiny_tokenizers
    made = [tiny.byte_level(), tiny.byte_fallback(), tiny.byte_fallback(True), tiny.word_piece()]
    return [Tokenizer(backend, {}, frozenset()) for backend in made]


def texts(draw: st.DrawFn) -> None:
    """Any text to ids and back, one at a time; any ids to text."""
    subject = draw(st.sampled_from(tokenizers()))
    said = draw(spoken(SPECIALS) | st.text(max_size=40))
    ids = draw(st.none() | st.lists(st.integers(0, subject.vocab_size + 3), max_size=30))
    with alarm():
        given = list(subject.encode(said, add_special_tokens=False)) if ids is None else ids
        detokenizer = Detokenizer(subject)
        told = "".join(detokenizer.push(id) for id in given) + detokenizer.flush()
        told.encode()
        if ids is None and not set(given) & subject.special_ids and "\ufffd" not in told:
            assert told == subject.decode(given)
        msgspec.json.encode([subject.token_bytes(id).decode("utf-8", "replace") for id in given])


@cache
def templates() -> list[ChatTemplate]:
    return [ChatTemplate({"default": source}) for source in chat_templates.ALL.values()] + [ChatTemplate({})]


def prompts(draw: st.DrawFn) -> None:
    """Conversations of any shape to every template: a prompt, or a refusal in words."""
    template = draw(st.sampled_from(templates()))
    body = draw(bent(REQUESTS["/v1/chat/completions"][0]))
    kwargs = draw(st.none() | st.dictionaries(st.text(max_size=8), JSON, max_size=3))
    try:
        request = msgspec.convert(body, ChatRequest)
    except (msgspec.ValidationError, RecursionError):
        return
    with alarm(), contextlib.suppress(PenstockError):
        template.render(body["messages"], function_tools(body, request), kwargs=kwargs)


def blocks(draw: st.DrawFn) -> None:
    """Anthropic's bodies as chat requests."""
    body = draw(bent(draw(st.sampled_from(REQUESTS["/v1/messages"]))))
    try:
        request = msgspec.convert(body, anthropic.MessagesRequest)
    except (msgspec.ValidationError, RecursionError):
        return
    with alarm(), contextlib.suppress(PenstockError):
        anthropic.as_chat(request)


def _is_json_object(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)  # what a body can hold
    except ValueError:
        return False
    return isinstance(value, dict)


def schemas(draw: st.DrawFn) -> None:
    """Schemas of answers and of tools: rules that the engine's compiler takes, or refusals."""
    schema = draw(SCHEMAS.filter(_is_json_object))
    strict = draw(st.booleans())
    with alarm(), contextlib.suppress(PenstockError):
        rule = grammar.json_rule(schema, "schema", strict=strict)
        made = grammar.answer(text_parts(), draw(st.sampled_from([None, True, False])), schema=rule)
        assert llguidance.LLMatcher.validate_grammar(made) == ""


TARGETS: dict[str, Callable[[st.DrawFn], None]] = {
    target.__name__: target
    for target in (requests, connections, calls, answers, texts, prompts, blocks, schemas)
}
