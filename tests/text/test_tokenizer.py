from __future__ import annotations

import threading
from pathlib import Path

import pytest
import tokenizers
from tests.support import tiny_tokenizers as tiny
from tokenizers import AddedToken

from penstock.text.errors import ModelFilesError
from penstock.text.tokenizer import Tokenizer


def test_reads_the_ids_that_end_an_answer_from_all_files(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, tiny.byte_level(), {"eos_token": {"content": "<|im_end|>"}})
    im_end = tiny.byte_level().token_to_id("<|im_end|>")
    assert Tokenizer.load(folder).eos_ids == {im_end}
    tiny.write_model(tmp_path, tiny.byte_level(), {"eos_token": "<|im_end|>"}, config={"eos_token_id": 7})
    assert Tokenizer.load(folder).eos_ids == {im_end, 7}
    tiny.write_model(
        tmp_path, tiny.byte_level(), {"eos_token": "<|im_end|>"}, generation_config={"eos_token_id": [3, 5]}
    )
    assert Tokenizer.load(folder).eos_ids == {im_end, 3, 5}, "generation_config.json stands above config.json"
    tiny.write_model(tmp_path, tiny.byte_level(), generation_config={"eos_token_id": [3, True]})
    assert Tokenizer.load(folder).eos_ids == {3}, "true is no id"


def test_says_in_one_sentence_what_is_wrong_with_the_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFilesError, match="can't be read"):
        Tokenizer.load(tmp_path)
    tiny.write_model(tmp_path, tiny.byte_level())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelFilesError, match="no JSON object"):
        Tokenizer.load(tmp_path)


def test_special_tokens_are_no_text_but_have_bytes() -> None:
    tokenizer = Tokenizer(tiny.byte_level(), {"bos_token": "<|endoftext|>"}, frozenset())
    ids = tokenizer.encode("a<|im_start|>b<think>", add_special_tokens=False)
    assert tokenizer.decode(ids) == "ab<think>"
    im_start = tokenizer.id_of("<|im_start|>")
    assert im_start in ids
    assert tokenizer.token_bytes(im_start) == b"<|im_start|>"
    assert tokenizer.bos_id == tokenizer.id_of("<|endoftext|>")
    assert tokenizer.id_of("no such token") is None


def test_bytes_of_ids_join_to_the_text() -> None:
    text = "Grüße, 日本 🦊!"
    for backend in (tiny.byte_level(), tiny.byte_fallback()):
        tokenizer = Tokenizer(backend, {}, frozenset())
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(id) for id in ids).decode() == text


def test_an_added_token_outside_the_byte_alphabet_is_itself() -> None:
    backend = tokenizers.Tokenizer.from_str(tiny.byte_level().to_str())
    backend.add_tokens([AddedToken("<｜tool｜>", normalized=False), AddedToken("a\u00a0b", normalized=False)])
    tokenizer = Tokenizer(backend, {}, frozenset())
    for name in ("<｜tool｜>", "a\u00a0b"):
        id = tokenizer.id_of(name)
        assert id is not None
        assert tokenizer.token_bytes(id).decode() == tokenizer.decode([id]) == name


def test_a_lone_surrogate_is_a_question_mark() -> None:
    tokenizer = Tokenizer(tiny.byte_level(), {}, frozenset())
    assert tokenizer.decode(tokenizer.encode("a\ud800b", add_special_tokens=False)) == "a?b"


def test_truncation_and_padding_of_the_file_do_not_apply() -> None:
    backend = tokenizers.Tokenizer.from_str(tiny.byte_level().to_str())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=100)
    assert len(Tokenizer(backend, {}, frozenset()).encode("1234567890", add_special_tokens=False)) == 10


def test_encoding_releases_the_gil() -> None:
    tokenizer = Tokenizer(tiny.byte_level(), {}, frozenset())
    text = "The quick brown fox, nobody minded. " * 8000
    encoded: list[int] = []
    thread = threading.Thread(
        target=lambda: encoded.append(len(tokenizer.encode(text, add_special_tokens=False)))
    )
    turns = 0
    thread.start()
    while not encoded:
        turns += 1
    thread.join()
    assert encoded[0] > 60_000
    assert turns > 10_000, "this thread stood still while the other one encoded"
