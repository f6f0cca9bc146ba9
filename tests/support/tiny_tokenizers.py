"""Tokenizers small enough to train in a test: byte-level BPE, byte-fallback BPE, WordPiece."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It was a fine day, and nobody minded.",
    "def main():\n    for index in range(10):\n        print(index, 'done')\n",
    'Calls are written as {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}.',
    "Grüße aus Köln: schöne Straßen, größere Bäume. Ça va? L'été est déjà là. Привет, мир!",
    "<tools> and [brackets] and 日本語のテキスト, 中文文本, 한국어 텍스트.",
] * 4

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|secret|>"]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@cache
def byte_level(marks: bool = True) -> tokenizers.Tokenizer:
    """Qwen's kind: byte-level BPE, chat tokens special, marks as added tokens that are not."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in MARKS if marks])
    return backend


@cache
def byte_fallback(strip: bool = False) -> tokenizers.Tokenizer:
    """Gemma's kind (or Llama 2's, which drops the first space): ▁ for spaces, unknown characters as bytes."""
    letters = sorted(set("".join(CORPUS)) - set("日本語のテキスト中文文本한국어텍스트"))
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=[letter for letter in letters if letter != " "],
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(["".join(c for c in text if c in letters) for text in CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(merge) for merge in model["merges"]],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@cache
def word_piece() -> tokenizers.Tokenizer:
    """BERT's kind: the text of a piece depends on its neighbours."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def with_special(*names: str) -> tokenizers.Tokenizer:
    """A byte-level tokenizer without marks, and with more special tokens."""
    backend = tokenizers.Tokenizer.from_str(byte_level(marks=False).to_str())
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return backend


def write_model(
    folder: Path, backend: tokenizers.Tokenizer, tokenizer_config: dict[str, Any] | None = None, **files: Any
) -> Path:
    """A model's folder without weights: tokenizer.json, tokenizer_config.json and NAME.json for each file."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": tokenizer_config or {}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
