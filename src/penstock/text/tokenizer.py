"""A model's tokenizer: text to ids and single ids to bytes, from `tokenizer.json` alone.

Owns the vocabulary and how a piece of it reads as bytes. Refuses models without a `tokenizer.json`
(a `tokenizer.model` needs its own converter) and never runs code that a model ships.
Invariant: `pieces` of consecutive ids, joined, are the bytes of their text, unless `pieces` is None:
then the decoder is of a kind that needs its neighbours, and only `decode` knows the text.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text a call: threads would only cost
import tokenizers

from penstock.pieces import reading
from penstock.text.errors import ModelFilesError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file. Raises ModelFilesError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelFilesError(f"{path} holds no JSON object.")
    return data


class Pieces(dict[int, bytes]):
    """The bytes of each id, worked out when first asked for; ids beyond the vocabulary have none."""

    def __init__(self, name_of: Callable[[int], str | None], to_bytes: Callable[[str], bytes]) -> None:
        super().__init__()
        self._name_of = name_of
        self._to_bytes = to_bytes

    def __missing__(self, id: int) -> bytes:
        name = self._name_of(id)
        piece = self[id] = b"" if name is None else self._to_bytes(name)
        return piece


class Tokenizer:
    """Encodes text and reads ids. Thread-safe: all state but the table of pieces is fixed after `load`.

    vocab_size: number of ids the tokenizer knows (a model's embedding may be padded beyond it).
    eos_ids: the ids that end an answer, from generation_config.json, config.json and the tokenizer's own.
    special_ids: ids that are control, not text; `decode` skips them. control_ids: these and eos_ids.
    leading: what becomes of the space that the first piece of a text starts with: "" (kept), "one"
    (one space is dropped), "all" (no space of the first piece counts).
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], eos_ids: frozenset[int]
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.config = config
        self.eos_ids = eos_ids
        self.vocab_size = backend.get_vocab_size()
        self.special_ids = frozenset(
            id for id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.control_ids = self.special_ids | eos_ids
        self.special_tokens = special_tokens(config)
        self.bos_id = self.id_of(self.special_tokens.get("bos_token", ""))
        self.leading, to_bytes = reading(json.loads(backend.to_str()).get("decoder"))
        self.pieces = None if to_bytes is None else Pieces(backend.id_to_token, to_bytes)

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Reads the tokenizer's files and the ids that end an answer. Raises ModelFilesError."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ModelFilesError(
                f"{model_dir} has no tokenizer.json; convert the model's tokenizer to that format."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelFilesError(f"{path} can't be read: {error}") from error
        config = read_json(model_dir / "special_tokens_map.json")
        config |= read_json(model_dir / "tokenizer_config.json")
        eos = read_json(model_dir / "generation_config.json").get("eos_token_id")
        if eos is None:
            eos = read_json(model_dir / "config.json").get("eos_token_id")
        ids = {id for id in (eos if isinstance(eos, list) else [eos]) if type(id) is int}
        own = backend.token_to_id(special_tokens(config).get("eos_token", ""))
        return cls(backend, config, frozenset(ids if own is None else ids | {own}))

    def encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        """Ids of `text`, typecode 'I', with `?` for lone surrogates. Releases the GIL while it works."""
        # A body can't hold those, but escapes in the arguments of a call can: a model has written them.
        text = text.encode(errors="replace").decode()
        ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return array("I", ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, incomplete characters as U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one id stands for; a special token's are its name's, an unknown id's are none."""
        if id in self.special_ids:
            return (self._backend.id_to_token(id) or "").encode()
        if self.pieces is not None:
            return self.pieces[id]
        return self._backend.decode([id], skip_special_tokens=False).encode()

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry, by its exact name."""
        return self._backend.token_to_id(token)


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens of a tokenizer_config.json (`bos_token`, `eos_token`, …) as text."""
    named = {key: value for key, value in config.items() if key.endswith("_token") and key[:4] != "add_"}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}
