"""Ids to text, one at a time: what is whole goes out, what may be half a character waits.

Owns the bytes of the character under way. Refuses to look back: the cost of an id doesn't depend on how
many came before. Invariant: all that `push` returned, and `flush` at the end, is the text of the ids
pushed. (For whole characters it equals the tokenizer's own decoding; broken byte sequences become U+FFFD
as Unicode recommends, where the tokenizers of the SentencePiece kind give up the valid bytes beside them.)
`tokenizers.decoders.DecodeStream` is not used: it can't flush, and it raises on some prefixes.
"""

from __future__ import annotations

import codecs

from penstock.text.tokenizer import Tokenizer

_utf8 = codecs.getincrementaldecoder("utf-8")
WINDOW = 16
"""The most ids a character can wait for before it is taken to be broken, where pieces have no bytes."""


class Detokenizer:
    """The text of a growing sequence of ids. `continues`: it follows a text, so its first space counts."""

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._pieces = tokenizer.pieces
        self._whole = tokenizer.decode
        self._decode = _utf8("replace").decode
        self._leading = "" if continues else tokenizer.leading
        self._window: list[int] = []
        self._known = 0

    def push(self, id: int) -> str:
        """The text that `id` makes certain; "" while it leaves a character open."""
        if self._pieces is None:
            return self._push_window(id)
        if self._leading:
            return self._first(self._pieces[id])
        return self._decode(self._pieces[id])

    def literal(self, text: str) -> str:
        """Puts in text that is no id's piece (a special token's name), after what is still open."""
        self._leading = ""
        return self.flush() + text

    def flush(self) -> str:
        """What is still open, as U+FFFD."""
        if self._pieces is None:
            text = self._whole(self._window)[len(self._whole(self._window[: self._known])) :]
            self._window.clear()
            self._known = 0
            return text
        return self._decode(b"", True)

    def _first(self, piece: bytes) -> str:
        if self._leading == "all":
            piece = piece.replace(b" ", b"")
            self._leading = ""
        text = self._decode(piece)
        if text and self._leading == "one":
            self._leading = ""
            return text.removeprefix(" ")
        return text

    def _push_window(self, id: int) -> str:
        # Decodes the last few ids with and without the new ones: the difference is theirs. The ids before
        # them stay in the window so that spaces and joins come out as in the middle of a text.
        window = self._window
        window.append(id)
        before, now = self._whole(window[: self._known]), self._whole(window)
        open_end = now.endswith("\ufffd") or len(now) <= len(before)
        if open_end and len(window) - self._known < WINDOW:
            return ""
        del window[: self._known]
        self._known = len(window)
        return now[len(before) :]
