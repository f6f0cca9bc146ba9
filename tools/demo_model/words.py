"""Word lists and small tables of facts that the conversation generator draws from, read from words.toml."""

import tomllib
from pathlib import Path
from typing import Any

_ALL: dict[str, Any] = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


def _list(name: str) -> list[str]:
    return list(_ALL[name])


def _table(name: str) -> dict[str, str]:
    return dict(_ALL[name])


CAPITALS, ELEMENTS, OPPOSITES = _table("capitals"), _table("elements"), _table("opposites")
SOUNDS, COLORS_OF, QUANTITIES = _table("sounds"), _table("colors_of"), _table("quantities")
FACTS, REASONS, SNIPPETS = _table("facts"), _table("reasons"), _table("snippets")
ANIMALS, FRUITS, COLORS, FOODS = _list("animals"), _list("fruits"), _list("colors"), _list("foods")
DAYS, MONTHS = _list("days"), _list("months")
NAMES, CITIES, LANGUAGES, TOPICS = _list("names"), _list("cities"), _list("languages"), _list("topics")
NOUNS, FOLDERS, EXTENSIONS = _list("nouns"), _list("folders"), _list("extensions")
VERBS, OBJECTS, FIELDS = _list("verbs"), _list("objects"), _list("fields")
SENTENCES, COMMANDS, JOKES = _list("sentences"), _list("commands"), _list("jokes")
CURRENCIES, ROOMS, ERRANDS, TABLES = _list("currencies"), _list("rooms"), _list("errands"), _list("tables")
SKIES, SYLLABLES = _list("skies"), _list("syllables")
