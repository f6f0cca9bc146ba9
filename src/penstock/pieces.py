"""How the names in a tokenizer.json read as bytes, which both sides of the process border need to know.

Owns the decoders whose pieces have bytes of their own. Refuses, with None, those that need a piece's
neighbours. Pure but for `vocabulary`, which reads the file and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def vocabulary(file: Path) -> tuple[list[bytes], set[int]]:
    """The bytes of every id in a tokenizer.json, and which ids are special: their bytes are their names.

    Raises ValueError where single ids have no bytes, OSError and KeyError for a file that is none.
    """
    data = json.loads(file.read_text(encoding="utf-8"))
    _, to_bytes = reading(data.get("decoder"))
    if to_bytes is None:
        raise ValueError("this tokenizer does not tell the text of single tokens")
    known = data["model"]["vocab"]
    names = {id_: name for name, id_ in known.items()} if isinstance(known, dict) else dict(enumerate(known))
    names = {id_: name if isinstance(name, str) else name[0] for id_, name in names.items()}
    added = {token["id"]: token for token in data.get("added_tokens") or []}
    names |= {id_: token["content"] for id_, token in added.items()}
    special = {id_ for id_, token in added.items() if token["special"]}
    width = max(names, default=-1) + 1
    spelt = [names.get(id_, "") for id_ in range(width)]
    return [name.encode() if id_ in special else to_bytes(name) for id_, name in enumerate(spelt)], special


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's alphabet for bytes, for str.translate: letter → the character numbered as its byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in printable]
    table = dict.fromkeys(hidden, "\u2603")  # outside Latin-1: marks a name that is no byte string
    table |= {byte: chr(byte) for byte in printable}
    return table | {0x100 + n: chr(byte) for n, byte in enumerate(hidden)}


_BYTES_OF = _byte_alphabet()


def _byte_level(name: str) -> bytes:
    try:
        return name.translate(_BYTES_OF).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()  # an added token, written as it is


def _sentencepiece(name: str) -> bytes:
    return name.replace("▁", " ").encode()


def _byte_fallback(name: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else _sentencepiece(name)


def reading(decoder: dict[str, Any] | None) -> tuple[str, Callable[[str], bytes] | None]:
    """How the pieces of a `decoder` (as tokenizer.json writes it) read: (leading, name → bytes or None).

    leading: see `text.tokenizer.Tokenizer`.
    """
    steps = [decoder] if decoder else []
    while len(steps) == 1 and steps[0].get("type") == "Sequence":
        steps = steps[0]["decoders"]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "", _byte_level
    if kinds == ["Metaspace"] and steps[0].get("replacement") == "▁":
        return "" if steps[0].get("prepend_scheme", "always") == "never" else "all", _sentencepiece
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaces:
        if kinds[3:] == []:
            return "", _byte_fallback
        if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return "one", _byte_fallback
    return "", None
