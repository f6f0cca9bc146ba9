from __future__ import annotations

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support import tiny_tokenizers as tiny
from tokenizers import decoders, models

from penstock.text.detokenizer import WINDOW, Detokenizer
from penstock.text.tokenizer import Tokenizer

emoji = st.sampled_from(
    ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "e\u0301", "🇫🇷", "\u200d", "\ufeff", "日本", "Ç", "\r\n", "  "]
)
anything = st.lists(st.one_of(st.text(max_size=8), emoji), max_size=8).map("".join)


def tokenizer(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, {}, frozenset())


def streamed(subject: Tokenizer, ids: list[int], *, continues: bool = False) -> str:
    detokenizer = Detokenizer(subject, continues=continues)
    return "".join(detokenizer.push(id) for id in ids) + detokenizer.flush()


@example("ok 🦊日本")
@given(anything)
def test_byte_level_equals_the_whole_decoding(text: str) -> None:
    subject = tokenizer(tiny.byte_level())
    ids = list(subject.encode(text, add_special_tokens=False))
    assert streamed(subject, ids) == subject.decode(ids) == text


@given(st.lists(st.integers(0, tiny.byte_level().get_vocab_size() - 1), max_size=20))
def test_byte_level_equals_the_whole_decoding_of_any_ids(ids: list[int]) -> None:
    subject = tokenizer(tiny.byte_level())
    ids = [id for id in ids if id not in subject.special_ids]
    assert streamed(subject, ids) == subject.decode(ids)


@pytest.mark.parametrize("strip", [False, True])
@example(text="ok 🦊日本")
@given(text=anything)
def test_byte_fallback_equals_the_whole_decoding(strip: bool, text: str) -> None:
    subject = tokenizer(tiny.byte_fallback(strip))
    ids = list(subject.encode(text, add_special_tokens=False))
    assert streamed(subject, ids) == subject.decode(ids)


@given(anything)
def test_word_pieces_equal_the_whole_decoding(text: str) -> None:
    subject = tokenizer(tiny.word_piece())
    assert subject.pieces is None
    ids = list(subject.encode(text, add_special_tokens=False))
    assert streamed(subject, ids) == subject.decode(ids)


@example("ok 🦊日本")
@given(anything)
def test_a_decoder_of_unknown_kind_equals_the_whole_decoding(text: str) -> None:
    backend = tokenizers.Tokenizer.from_str(tiny.byte_fallback().to_str())
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("q", "Q")]
    )
    subject = tokenizer(backend)
    assert subject.pieces is None
    ids = list(subject.encode(text, add_special_tokens=False))
    assert streamed(subject, ids) == subject.decode(ids)


def test_metaspace_drops_the_first_space_only() -> None:
    backend = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("▁▁the", -3.0)], unk_id=0)
    )
    backend.decoder = decoders.Metaspace()
    subject = tokenizer(backend)
    for ids in ([1, 1], [2, 1], [2, 2, 1], [3, 3], [1]):
        assert streamed(subject, ids) == subject.decode(ids)


def test_half_a_character_waits_for_its_other_half() -> None:
    subject = tokenizer(tiny.byte_level())
    detokenizer = Detokenizer(subject)
    ids = subject.encode("🦊", add_special_tokens=False)
    assert len(ids) == 4, "an emoji that the corpus lacks is four ids"
    assert [detokenizer.push(id) for id in ids] == ["", "", "", "🦊"]


def test_half_a_character_at_the_end_is_shown_as_broken() -> None:
    subject = tokenizer(tiny.byte_level())
    ids = list(subject.encode("ok🦊", add_special_tokens=False))[:-1]
    assert streamed(subject, ids) == "ok\ufffd"
    spm = tokenizer(tiny.byte_fallback())
    assert streamed(spm, list(spm.encode("ok🦊", add_special_tokens=False))[:-1]) == "ok\ufffd"


def test_what_continues_a_text_keeps_its_first_space() -> None:
    subject = tokenizer(tiny.byte_fallback(strip=True))
    ids = list(subject.encode("the fox", add_special_tokens=False))
    assert streamed(subject, ids) == "the fox"
    assert streamed(subject, ids, continues=True) == " the fox"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    subject = tokenizer(tiny.byte_level())
    assert streamed(subject, [999_999]) == ""


def test_a_window_that_never_ends_is_cut() -> None:
    subject = tokenizer(tiny.word_piece())
    detokenizer = Detokenizer(subject)
    silent = [999_999] * 100
    assert "".join(detokenizer.push(id) for id in silent) == ""
    assert len(detokenizer._window) <= 2 * WINDOW
