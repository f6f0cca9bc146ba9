"""Conversations without tools: each topic is a function from a `Draw` to question, thought and answer.

The wordings are in chat.toml. Answers are a sentence or two, always closed; what a small model can't
know is said to be so.
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.demo_model import words
from tools.demo_model.corpus import Definition, Document
from tools.demo_model.draw import Draw

SAY: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("chat.toml").read_text(encoding="utf-8"))


class Turn(NamedTuple):
    """One question, the short thought before the answer, and the answer."""

    question: str
    thought: str
    answer: str


Topic = Callable[[Draw], Turn]


def greeting(draw: Draw) -> Turn:
    """Hello, with or without the user's name."""
    question, answer = draw.one(SAY["hello"]), draw.any(SAY["hello_answers"])
    if draw.chance(0.3):
        name = draw.person()
        said = draw.any(["I am {}", "I'm {}", "my name is {}", "this is {}"]).format(name)
        question = f"{question.rstrip('!')}, {said}{draw.any(['.', '!', ''])}"
        answer = f"{answer[:-1]}, {name}!"
    elif draw.chance(0.3):
        question += draw.any(SAY["hello_more"])
        answer += " I am fine and ready to help. What would you like to try?"
        return Turn(question, "The user greets me.", answer)
    return Turn(question, "The user greets me. I greet back.", f"{answer} {draw.any(SAY['offers'])}")


def _plain(question: str, thought: str) -> Topic:
    """A topic whose questions and answers are lists of chat.toml."""

    def topic(draw: Draw) -> Turn:
        return Turn(draw.one(SAY[question]), thought, draw.any(SAY[question + "_answers"]))

    return topic


def joke(draw: Draw) -> Turn:
    """One of a few jokes."""
    return Turn(draw.one(SAY["joke"]), "The user wants a joke.", draw.any(words.JOKES))


def _fact(question: str, table: dict[str, str], thought: str, answer: str) -> Topic:
    """A topic that looks up a table; {0} is the key, {1} the value."""

    def topic(draw: Draw) -> Turn:
        key = draw.any(list(table))
        said = answer.format(key, table[key])
        asked = draw.one(SAY[question]).format(key)
        return Turn(asked, thought.format(key), said[0].upper() + said[1:].replace("D.C..", "D.C."))

    return topic


def opposite(draw: Draw) -> Turn:
    """A word's opposite, in both directions."""
    one, other = draw.random.choice(list(words.OPPOSITES.items()))
    if draw.chance(0.5):
        one, other = other, one
    asked = draw.any(SAY["opposite"]).format(one)
    return Turn(asked, f"The opposite of {one}.", f"The opposite of {one} is {other}.")


def quantity(draw: Draw) -> Turn:
    """How many of something there are."""
    key = draw.any(list(words.QUANTITIES))
    subject, _, place = key.partition(" ")
    asked = draw.any(SAY["quantity"]).format(subject, place)
    return Turn(asked, "A number to recall.", f"The number of {key} is {words.QUANTITIES[key]}.")


def code(draw: Draw) -> Turn:
    """A few lines of Python in a fenced block."""
    task = draw.any(list(words.SNIPPETS))
    thought = f"The user wants code to {task}."
    return Turn(draw.one(SAY["code"]).format(task), thought, f"```python\n{words.SNIPPETS[task]}\n```")


def arithmetic(draw: Draw) -> Turn:
    """Sums, differences and products of small numbers, and comparisons."""
    high = 99 if draw.chance(0.3) else 20
    a, b = draw.number(0, high), draw.number(0, high)
    kind = draw.number(0, 3)
    if kind == 3:
        answer = f"{max(a, b)} is larger." if a != b else "They are equal."
        return Turn(draw.any(SAY["larger"]).format(a, b), f"I compare {a} and {b}.", answer)
    if kind == 0:
        text, result = f"{a} {draw.any(['+', 'plus'])} {b}", f"{a} + {b} = {a + b}."
    elif kind == 1:
        a, b = max(a, b), min(a, b)
        text, result = f"{a} {draw.any(['-', 'minus'])} {b}", f"{a} - {b} = {a - b}."
    else:
        a, b = a % 13, b % 13
        text, result = f"{a} {draw.any(['*', 'times', 'x'])} {b}", f"{a} * {b} = {a * b}."
    return Turn(draw.one(SAY["sum"]).format(text), "A small calculation.", result)


def repeating(draw: Draw) -> Turn:
    """The user's words again, or a word's letters."""
    if draw.chance(0.7):
        text = draw.sentence()
        return Turn(draw.one(SAY["repeat"]).format(text), "I repeat the text.", text)
    word = draw.any(words.ANIMALS + words.FRUITS + words.COLORS)
    return Turn(draw.any(SAY["spell"]).format(word), f"I spell {word}.", "-".join(word) + ".")


def counting(draw: Draw) -> Turn:
    """1, 2, 3 and so on; or what comes after Monday."""
    if draw.chance(0.5):
        last = draw.number(2, 15)
        numbers = ", ".join(map(str, range(1, last + 1)))
        return Turn(draw.one(SAY["count"]).format(last), f"I count to {last}.", numbers + ".")
    unit, items = draw.random.choice([("day", words.DAYS), ("month", words.MONTHS)])
    i, step = draw.number(0, len(items) - 1), draw.random.choice([1, -1])
    side, other = "after" if step == 1 else "before", items[(i + step) % len(items)]
    answer = f"{other} comes {side} {items[i]}."
    return Turn(f"Which {unit} comes {side} {items[i]}?", f"The {unit} {side} {items[i]}.", answer)


def naming(draw: Draw) -> Turn:
    """A few animals, as a sentence or a list; or a person as JSON."""
    if draw.chance(0.3):
        name, age = draw.person(), draw.number(5, 90)
        asked = draw.any(SAY["json"]).format(name, age)
        return Turn(asked, "The user wants JSON.", f'{{"name": "{name}", "age": {age}}}')
    kinds = {
        "animals": words.ANIMALS,
        "fruits": words.FRUITS,
        "colors": words.COLORS,
        "foods": words.FOODS,
        "cities": words.CITIES,
        "names": words.NAMES,
    }
    label = draw.any(list(kinds))
    count = draw.number(2, 5)
    number = ["two", "three", "four", "five"][count - 2]
    picked = draw.some(kinds[label], count)
    if draw.chance(0.3):
        ask, answer = "list_some", "\n".join(f"{i}. {p}" for i, p in enumerate(picked, 1))
    else:
        ask, answer = "name_some", ", ".join(picked[:-1]) + f" and {picked[-1]}."
    asked = draw.any(SAY[ask]).format(number, label)
    return Turn(asked, f"I name {number} {label}.", answer[0].upper() + answer[1:])


def story(draw: Draw) -> Turn:
    """A longer text, so that streaming has something to show."""
    animal, friend = draw.some(words.ANIMALS, 2)
    fruit, day, name = draw.any(words.FRUITS), draw.any(words.DAYS), draw.any(words.NAMES)
    opening = draw.any(
        [
            f"Once there was a {animal} called {name}.",
            f"A {animal} named {name} lived by the river.",
            f"On a {day} morning, a {animal} called {name} woke up early.",
        ]
    )
    middle = draw.any(
        [
            f"One day {name} met a {friend} who was looking for a {fruit}.",
            f"{name} wanted a {fruit}, but the tree was too high. Then a {friend} came by.",
            f"{name} found a {fruit} under a tree. A {friend} saw it and asked for a piece.",
        ]
    )
    turn = draw.any(
        [
            "They searched the forest together until it was dark.",
            "They talked for a long time and laughed.",
            f"The {friend} said: 'Let us share it.'",
            "They walked along the water and sang a song.",
        ]
    )
    end = draw.any(
        [
            f"In the end they shared the {fruit} and became friends.",
            f"Since then the {animal} and the {friend} meet every {day}.",
            "At home they made tea and told everybody about their day.",
        ]
    )
    thought = f"I make up a short story about a {animal}."
    return Turn(draw.one(SAY["story"]).format(animal), thought, f"{opening} {middle} {turn} {end}")


def unknown(draw: Draw) -> Turn:
    """What a model of this size can't know."""
    topic = draw.one(words.TOPICS) if draw.chance(0.5) else draw.thing()
    asked = draw.one(SAY["unknown"]).format(topic)
    return Turn(asked, f"I know little about {topic}.", draw.any(SAY["unknown_answers"]).format(topic))


def definition(draw: Draw, known: list[Definition]) -> Turn:
    """What a function of the standard library does, from its docstring."""
    d = draw.random.choice(known)
    asked = draw.one(SAY["class_question" if d.signature == "class" else "function_question"])
    return Turn(asked.format(d.name), f"A question about Python's {d.name}.", f"`{d.name}`: {d.sentence}")


def summary(draw: Draw, documents: list[Document]) -> Turn:
    """A pasted passage and its first sentence as the gist."""
    text = passage(draw, documents, draw.number(200, 900))
    gist = " ".join(text.split())
    cut = gist.find(". ")
    gist = gist[: cut + 1] if 20 <= cut <= 160 else gist[: gist[:100].rfind(" ")] + "..."
    return Turn(draw.any(SAY["summary"]).format(text), "I give the main point.", f"It says: {gist}")


def passage(draw: Draw, documents: list[Document], length: int) -> str:
    """About ``length`` characters of a training document, from one blank line to another."""
    while True:
        text = draw.random.choice(documents).text
        if len(text) < length + 200:
            continue
        start = text.find("\n\n", draw.number(0, len(text) - length - 100)) + 2
        return text[start : start + length].rsplit("\n", 1)[0].strip() or "Nothing."


TOPICS: list[tuple[float, Topic]] = [
    (1.2, greeting),
    (0.5, _plain("how_are_you", "A friendly question. I answer briefly.")),
    (1.0, _plain("identity", "The user asks who I am.")),
    (0.7, _plain("ability", "The user asks what I can do.")),
    (0.4, _plain("thanks", "The user is content.")),
    (0.3, _plain("bye", "The user says goodbye.")),
    (0.3, joke),
    (1.5, _fact("capital", words.CAPITALS, "A question about {}.", "The capital of {} is {}.")),
    (0.4, _fact("element", words.ELEMENTS, "A chemical symbol.", "The symbol of {} is {}.")),
    (0.3, _fact("sound", words.SOUNDS, "A sound of an animal.", "A {} says {}.")),
    (0.3, _fact("color", words.COLORS_OF, "A question about a color.", "{} is {}.")),
    (0.8, _fact("fact", words.FACTS, "The user asks about {}.", "{1}")),
    (0.6, _fact("reason", words.REASONS, "The user asks why.", "{1}")),
    (0.4, opposite),
    (0.4, quantity),
    (1.2, code),
    (1.5, arithmetic),
    (1.0, repeating),
    (1.0, counting),
    (0.8, naming),
    (1.0, story),
    (3.0, unknown),
]
