"""Whole conversations: system prompt, turns, tools, thoughts; rendered by the model's own template.

`conversation` makes the messages, `Renderer` the text. A conversation ends with an assistant's turn,
and with the text of that turn's thought where thinking is on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tools.demo_model import chat, tool_talk, words
from tools.demo_model.corpus import Definition, Document
from tools.demo_model.draw import Draw

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in OpenAI's shape, the tools offered, and whether the last turns think."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = True


@dataclass(frozen=True, slots=True)
class Sources:
    """What the licensed text gives to conversations: training documents and definitions."""

    documents: list[Document]
    definitions: list[Definition]


def stream(seed: int, sources: Sources) -> Iterator[Conversation]:
    """Endless training conversations of this seed."""
    draw = Draw(seed)
    while True:
        yield conversation(draw, sources)


def conversation(draw: Draw, sources: Sources) -> Conversation:
    """One conversation: 40 % use a tool, 10 % have tools that don't fit, 10 % ask for one that is absent."""
    thinking = draw.chance(0.5)
    kind = draw.random.random()
    if kind < 0.4:
        return _with_tools(draw, sources, thinking)
    messages = system(draw, sources)
    tools = _schemas(draw, draw.number(1, 3)) if kind < 0.5 else []
    messages += _talk(draw, sources, thinking, draw.random.choices([1, 2, 3], [5, 3, 2])[0])
    if kind > 0.9:
        messages += _messages(_without_tool(draw), thinking)
    return Conversation(messages, tools, thinking)


def system(draw: Draw, sources: Sources) -> list[Message]:
    """No system prompt, a usual sentence, or a long text as agents send it."""
    kind = draw.random.random()
    if kind < 0.6:
        return []
    text = draw.one(chat.SAY["system"])
    if kind < 0.85:
        return [_message("system", text)]
    if kind < 0.92:
        text += (
            f" The user is {draw.person()}. Today is {draw.any(words.DAYS)}. The folder is {draw.folder()}."
        )
        return [_message("system", text)]
    text += "\n\n" + chat.passage(draw, sources.documents, draw.number(150, 1600))
    return [_message("system", text)]


def turn(draw: Draw, sources: Sources) -> chat.Turn:
    """One question with its answer, of any topic."""
    kind = draw.random.random()
    if kind < 0.12:
        return chat.definition(draw, sources.definitions)
    if kind < 0.15:
        return chat.summary(draw, sources.documents)
    weights, topics = zip(*chat.TOPICS, strict=True)
    topic: chat.Topic = draw.random.choices(topics, weights)[0]
    return topic(draw)


def _talk(draw: Draw, sources: Sources, thinking: bool, count: int) -> list[Message]:
    turns = [turn(draw, sources) for _ in range(count)]
    if draw.chance(0.08):
        turns = _memory(draw, turns[0])
    return [message for one in turns for message in _messages(one, thinking)]


def _messages(one: chat.Turn, thinking: bool) -> list[Message]:
    answer = _message("assistant", one.answer, reasoning_content=one.thought if thinking else "")
    return [_message("user", one.question), answer]


def _without_tool(draw: Draw) -> chat.Turn:
    """A question that would need a tool where none is offered."""
    used = tool_talk.use(draw)
    return chat.Turn(used.question, "No tool fits.", draw.any(chat.SAY["no_tool_answers"]))


def _memory(draw: Draw, between: chat.Turn) -> list[chat.Turn]:
    """Something said earlier that a later question asks for."""
    values = {
        "name": draw.person(),
        "favorite color": draw.any(words.COLORS),
        "favorite animal": "the " + draw.any(words.ANIMALS),
        "favorite food": draw.any(words.FOODS),
        "city": draw.city(),
        "lucky number": str(draw.number(1, 99)),
    }
    thing = draw.any(list(values))
    value = values[thing]
    answer = f"Good to know: your {thing} is {value}."
    first = chat.Turn(f"My {thing} is {value}.", f"The user's {thing} is {value}.", answer)
    asked = draw.any(chat.SAY["remember"]).format(thing)
    last = chat.Turn(asked, f"The user told me: {value}.", f"Your {thing} is {value}.")
    return [first, between, last] if draw.chance(0.6) else [first, last]


def _with_tools(draw: Draw, sources: Sources, thinking: bool) -> Conversation:
    messages = system(draw, sources)
    if draw.chance(0.2):
        messages += _talk(draw, sources, thinking, 1)
    drawn = [tool_talk.use(draw) for _ in range(draw.random.choices([1, 2, 3], [5, 3, 2])[0])]
    uses = list({one.name: one for one in drawn}.values())
    if len(uses) == 2 and draw.chance(0.3):
        first, second = (one.question for one in uses)
        messages.append(_message("user", first.rstrip(".") + draw.any(chat.SAY["joined"]) + second))
        messages += _calls(draw, uses, thinking)
    else:
        for one in uses:
            messages.append(_message("user", one.question))
            messages += _calls(draw, [one], thinking)
    if draw.chance(0.3):  # so that the call itself is often the last turn, with its thought
        while messages[-1]["role"] != "assistant" or not messages[-1].get("tool_calls"):
            messages.pop()
    schemas = [one.schema for one in uses]
    names = {one.name for one in uses}
    schemas += [s for s in _schemas(draw, draw.number(0, 3)) if s["function"]["name"] not in names]
    draw.random.shuffle(schemas)
    return Conversation(messages, schemas, thinking)


def tool_prompt(draw: Draw, sources: Sources) -> tuple[Conversation, dict[str, Any]]:
    """A question that fits one of the offered tools, and the call it should give (for the evaluation)."""
    used = tool_talk.use(draw)
    messages = [*system(draw, sources), _message("user", used.question)]
    schemas = [
        used.schema,
        *(s for s in _schemas(draw, draw.number(0, 5)) if s["function"]["name"] != used.name),
    ]
    draw.random.shuffle(schemas)
    return Conversation(messages, schemas, draw.chance(0.5)), {"name": used.name, "arguments": used.arguments}


def _calls(draw: Draw, uses: list[tool_talk.Use], thinking: bool) -> list[Message]:
    """The calling turn, the tools' responses and the closing sentence."""
    names = " and ".join(one.name for one in uses)
    thought = f"I call {names}." if thinking else ""
    messages = [_message("assistant", "", reasoning_content=thought, tool_calls=[one.call for one in uses])]
    answers = []
    for one in uses:
        result, answer = one.result, one.answer
        if draw.chance(0.07):
            result, answer = tool_talk.error_of(draw, one)
        messages.append(_message("tool", result))
        answers.append(answer)
    thought = "I have the result." if thinking else ""
    return [*messages, _message("assistant", " ".join(answers), reasoning_content=thought)]


def _schemas(draw: Draw, count: int) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for _ in range(count):
        schema = tool_talk.use(draw).schema
        found[schema["function"]["name"]] = schema
    return list(found.values())


def _message(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


class Renderer:
    """The model's chat template, rendered as HF and Penstock do: sandboxed, blocks trimmed."""

    def __init__(self, template: Path) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = tool_talk.show
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(template.read_text(encoding="utf-8"))

    def whole(self, c: Conversation) -> str:
        """The conversation with its last assistant turn."""
        return self._template.render(messages=c.messages, tools=c.tools, add_generation_prompt=False)

    def prompt(self, c: Conversation) -> str:
        """The conversation up to where the model goes on."""
        return self._template.render(
            messages=c.messages, tools=c.tools, add_generation_prompt=True, enable_thinking=c.thinking
        )


def _raise(message: str) -> str:
    raise ValueError(message)
