"""Conversations with tools: varied schemas, a question that fits one, the call, the final sentence.

A quarter of the tools are invented (verb_object with random fields), so that the model learns to copy
names and arguments from the schema and the question instead of knowing the tools.
"""

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.demo_model import words
from tools.demo_model.draw import Draw

KINDS: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("tools.toml").read_text())["tool"]


@dataclass(frozen=True, slots=True)
class Use:
    """One use of one tool: its schema, the question, the call and what follows."""

    schema: dict[str, Any]
    question: str
    arguments: dict[str, Any]
    result: str
    answer: str

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.schema["function"]["name"])

    @property
    def call(self) -> dict[str, Any]:
        """The call as OpenAI's API writes it, with arguments as an object."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def use(draw: Draw) -> Use:
    """A tool with one use of it; a quarter are invented."""
    if draw.chance(0.25):
        return _invented(draw)
    return _known(draw, draw.random.choice(KINDS))


def error_of(draw: Draw, used: Use) -> tuple[str, str]:
    """A failed result and the sentence that reports it."""
    reason = draw.any(
        ["not found", "permission denied", "timeout", "invalid argument", "service unavailable"]
    )
    return f"Error: {reason}", f"The tool {used.name} failed: {reason}."


def _known(draw: Draw, kind: dict[str, Any]) -> Use:
    name = draw.one(kind["names"])
    if draw.chance(0.1):
        name = (
            draw.any(["mcp__{}__", "functions_{}_", "{}__"]).format(draw.any(["fs", "web", "home", "dev"]))
            + name
        )
    values = [_value(draw, parameter[0]) for parameter in kind["parameters"]]
    keys = [draw.any(parameter[1]) for parameter in kind["parameters"]]
    properties = {}
    for key, value, parameter in zip(keys, values, kind["parameters"], strict=True):
        properties[key] = _property(draw, value, parameter[2])
    schema = _schema(draw, name, draw.any(kind["about"]), properties)
    marks = {f"<{'abc'[i]}>": str(value) for i, value in enumerate(values)}
    marks |= {
        "<n>": str(draw.number(1, 99)),
        "<w>": draw.word(),
        "<f>": draw.file(),
        "<k>": draw.any(words.SKIES),
    }
    marks |= {"<s>": draw.sentence(), "<tool>": name}
    question, result, answer = draw.one(kind["questions"]), kind["result"], draw.any(kind["answers"])
    question, result, answer = (_fill(text, marks) for text in (question, result, answer))
    return Use(schema, question, dict(zip(keys, values, strict=True)), result, answer)


def _invented(draw: Draw) -> Use:
    verb, thing = draw.one(words.VERBS), draw.nonsense()
    if draw.chance(0.7):
        thing = draw.one(words.OBJECTS)
    style = draw.any(["{}_{}", "{}_{}", "{}-{}", "{}{}"])
    name = style.format(verb, thing.capitalize() if style == "{}{}" else thing)
    arguments: dict[str, Any] = {}
    for field in draw.some(words.FIELDS, draw.number(1, 3)):
        arguments[field] = _value(draw, draw.any(["word", "count", "person", "city", "file", "day"]))
    properties = {k: _property(draw, v, f"The {k}") for k, v in arguments.items()}
    schema = _schema(draw, name, f"{verb.capitalize()} the {thing}.", properties)
    pairs = [f"{k} {v}" for k, v in arguments.items()]
    link = draw.any([" and ", ", "])
    patterns = [
        "{verb} the {thing} with {pairs}.", "Please {verb} a {thing} with {pairs}.",
        "Call {name} with {pairs}.",
        "Use {name}: {pairs}", "Can you {verb} the {thing}? {pairs}.", "I want to {verb} a {thing}: {pairs}",
        "{name} with {pairs}", "{verb} {thing}, {pairs}", "Use the tool {name} with {pairs}.",
    ]  # fmt: skip
    question = draw.one(patterns).format(verb=verb, thing=thing, name=name, pairs=link.join(pairs))
    word = draw.word()
    result, answer = draw.random.choice([
        ('{"status": "ok"}', f"Done: the {thing} is ready."),
        (f'{{"{thing}": "{word}"}}', f"The {thing} is {word}."),
        (word, f"The result is {word}."),
    ])  # fmt: skip
    return Use(schema, question[0].upper() + question[1:], arguments, result, answer)


def _schema(draw: Draw, name: str, about: str, properties: dict[str, Any]) -> dict[str, Any]:
    required = list(properties)
    if draw.chance(0.3):
        properties = dict(properties)
        extra = draw.any(words.FIELDS)
        if extra not in properties:
            properties[extra] = {"type": draw.any(["string", "integer", "boolean"])}
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    if draw.chance(0.15):
        parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def _property(draw: Draw, value: str | int, description: str) -> dict[str, Any]:
    kind = "string" if isinstance(value, str) else "integer"
    return {"type": kind, "description": description} if draw.chance(0.7) else {"type": kind}


def _fill(text: str, marks: dict[str, str]) -> str:
    return re.sub(r"<\w+>", lambda m: marks.get(m.group(), m.group()), text)


def _value(draw: Draw, kind: str) -> str | int:
    """A random value of a kind named in tools.toml."""
    number = draw.number
    makers: dict[str, Callable[[], str | int]] = {
        "city": draw.city,
        "topic": lambda: draw.one(words.TOPICS) if draw.chance(0.6) else f"{draw.word()} {draw.word()}",
        "expression": lambda: _expression(draw),
        "file": draw.file,
        "folder": draw.folder,
        "command": lambda: draw.one(words.COMMANDS) if draw.chance(0.7) else f"python {draw.file()}",
        "sentence": draw.sentence,
        "language": lambda: draw.one(words.LANGUAGES),
        "word": draw.word,
        "pattern": lambda: draw.any(["*.{}", "**/*.{}", "src/*.{}"]).format(draw.any(words.EXTENSIONS)),
        "person": draw.person,
        "count": lambda: number(1, draw.random.choice([10, 99, 999])),
        "currency": lambda: draw.any(words.CURRENCIES),
        "symbol": lambda: "".join(draw.random.choices("ABCDEFGHIKLMNOPRSTUVXYZ", k=number(3, 4))),
        "errand": lambda: draw.one(words.ERRANDS),
        "day": lambda: draw.any(words.DAYS),
        "music": lambda: (
            f"{draw.word()} by {draw.person()}" if draw.chance(0.5) else draw.sentence().rstrip(".!?")
        ),
        "room": lambda: draw.one(words.ROOMS),
        "switch": lambda: draw.any(["on", "off"]),
        "url": lambda: f"https://{draw.nonsense()}.{draw.any(['com', 'org', 'net'])}/{draw.word()}",
        "sql": lambda: f"SELECT {draw.any(words.FIELDS)} FROM {draw.any(words.TABLES)} LIMIT {number(1, 50)}",
    }
    return makers[kind]()


def _expression(draw: Draw) -> str:
    a, b = draw.number(2, 9999), draw.number(2, 999)
    text = f"{a} {draw.any(['+', '-', '*', '/'])} {b}"
    return text if draw.chance(0.7) else f"({text}) {draw.any(['+', '*'])} {draw.number(2, 99)}"


def show(arguments: dict[str, Any]) -> str:
    """Arguments as the model writes them (used by the evaluation)."""
    return json.dumps(arguments, ensure_ascii=False)
