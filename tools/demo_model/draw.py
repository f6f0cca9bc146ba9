"""Seeded choices for the generator, with templates and values split into training and held-out ones.

A held-out `Draw` prefers the items that a training `Draw` never returns, so that the evaluation's
prompts are new in wording as well as in their values. Lists too short to split are shared.
"""

import random
import zlib
from collections.abc import Sequence

from tools.demo_model import words

_SPLIT_FROM = 8
_HELD_OUT_OF = 8


class Draw:
    """A random source bound to one side of the split."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.random = random.Random(f"{seed}/{held_out}")
        self.held_out = held_out

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random.random() < probability

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return self.random.randint(low, high)

    def any(self, items: Sequence[str]) -> str:
        """One of the items, whatever its side (for answers)."""
        return self.random.choice(items)

    def one(self, items: Sequence[str]) -> str:
        """One of the items of this side of the split (for questions and values)."""
        if len(items) < _SPLIT_FROM:
            return self.random.choice(items)
        while True:
            item = self.random.choice(items)
            side = zlib.crc32(item.encode()) % _HELD_OUT_OF == 0
            if side == self.held_out or (self.held_out and self.chance(0.02)):
                return item

    def some(self, items: Sequence[str], count: int) -> list[str]:
        """Several different items, both sides of the split."""
        return self.random.sample(list(items), min(count, len(items)))

    def nonsense(self) -> str:
        """An invented word, so that copying is learned rather than a vocabulary."""
        return "".join(self.random.choice(words.SYLLABLES) for _ in range(self.number(2, 4)))

    def word(self) -> str:
        """A noun or an invented word."""
        return self.nonsense() if self.chance(0.4) else self.one(words.NOUNS)

    def thing(self) -> str:
        """A phrase of one to three words that no list has."""
        adjective = self.any([*words.COLORS, *words.OPPOSITES, *words.OPPOSITES.values()])
        patterns = ["{1}", "the {1}", "a {0} {1}", "my {1}", "{1} and {2}", "the {0} {1}", "{1}s", "{2} {1}s"]
        return self.any(patterns).format(adjective, self.word(), self.one(words.OBJECTS))

    def file(self) -> str:
        """A file path such as src/report.md."""
        name = f"{self.word()}{self.number(1, 99) if self.chance(0.2) else ''}.{self.any(words.EXTENSIONS)}"
        return name if self.chance(0.4) else f"{self.folder()}/{name}"

    def folder(self) -> str:
        """A folder path of one to three parts."""
        parts = [
            self.any(words.FOLDERS) if self.chance(0.7) else self.word() for _ in range(self.number(1, 3))
        ]
        return ("/" if self.chance(0.15) else "") + "/".join(parts)

    def city(self) -> str:
        """A city, sometimes an invented one."""
        return self.nonsense().capitalize() if self.chance(0.2) else self.one(words.CITIES)

    def person(self) -> str:
        """A first name, sometimes an invented one."""
        return self.nonsense().capitalize() if self.chance(0.2) else self.one(words.NAMES)

    def sentence(self) -> str:
        """A short sentence to translate, repeat, write or send."""
        if self.chance(0.5):
            return self.one(words.SENTENCES)
        who, what = self.person(), self.word()
        pattern = self.any(
            ["{} has a new {}.", "{} likes the {}.", "The {1} belongs to {0}.", "{} lost the {}."]
        )
        return pattern.format(who, what)
