"""Grammars of the rows on board: compiled beside the steps, advanced by what was drawn, asked for masks.

Owns the matchers (llguidance) and the tokenizer they share, which is loaded when the first grammar comes.
Compiling has threads of its own, since it may take a while and touches no MLX; a row decodes once that is
done. Refuses a grammar that does not compile, or in time, or grows too complex: that request fails, no other.
Invariant: a matcher's state is a function of the grammar and the answer's ids, nothing else, so a row that
was preempted, rolled back or continued in another process goes on where it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from penstock.engine.accounts import Accounts
from penstock.engine.penalties import Mask
from penstock.engine.sequence import Sequence
from penstock.memory.ledger import Lease
from penstock.pieces import vocabulary
from penstock.wire import GRAMMAR_LIMITS

MATCHER_BYTES = 4 << 20
"""Host bytes of a matcher at the limit of its lexer's states, measured; its grammar's text comes on top."""
PER_GRAMMAR_BYTE = 32
"""Host bytes for each byte of a grammar's text, measured with an enumeration of 20,000 strings."""
PER_FILE_BYTE = 10
"""Host bytes of the tokenizer for each byte of its file, measured with 150,000 and 250,000 ids."""
COMPILE_BEAT = 0.005
"""Seconds between looks at what compiles, while there is nothing else to do."""
COMPILE_SECONDS = 30.0
"""After these a grammar is given up."""

Verdict = dict[str, Any]
"""How a sequence ends, as `Loop._end` takes it; empty: it goes on."""


class Grammars:
    """The matchers of the rows on board, by sequence id."""

    def __init__(self, accounts: Accounts, folder: Path, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """`folder`: the model's; `vocab_size`: the logits' width."""
        self._accounts = accounts
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._tokenizer: Any = None
        self._loading = threading.Lock()
        self._compiling: dict[int, tuple[Sequence, Future[Any], float]] = {}
        self._matchers: dict[int, Any] = {}
        self._leases: dict[int, Lease] = {}
        self._shared: Lease | None = None

    @property
    def compiling(self) -> bool:
        """Some row waits for its grammar, which no message will tell of."""
        return bool(self._compiling)

    def host_bytes(self, grammar: str) -> int:
        """Host bytes that a row with this grammar needs; the first one's hold the tokenizer, too."""
        if not grammar:
            return 0
        shared = 0 if self._shared else self._tokenizer_bytes()
        return MATCHER_BYTES + PER_GRAMMAR_BYTE * len(grammar) + shared

    def begin(self, sequence: Sequence) -> None:
        """Compile the grammar of a row that has come on board, up to the end of its answer so far."""
        if self._shared is None:
            self._shared = self._accounts.constrain(self._tokenizer_bytes())
        self._leases[sequence.id] = self._accounts.constrain(self.host_bytes(sequence.grammar))
        work: Future[Any] = Future()
        self._compiling[sequence.id] = sequence, work, time.monotonic()
        answer = sequence.tokens[sequence.prompt_length :]
        arguments = (work, sequence.grammar, answer.tolist())
        threading.Thread(target=self._compile, args=arguments, daemon=True).start()

    def compiled(self) -> Iterator[tuple[Sequence, Verdict]]:
        """Let the rows decode whose grammar is there by now; returns those that end at once."""
        for id_, (sequence, work, began) in list(self._compiling.items()):
            if not work.done() and time.monotonic() - began < COMPILE_SECONDS:
                continue
            del self._compiling[id_]
            sequence.compiling = False
            problem = work.exception() if work.done() else "it takes too long to compile"
            if problem is None:
                self._matchers[id_] = work.result()
            if verdict := _broken(str(problem)) if problem else _verdict(work.result()):
                yield sequence, verdict

    def drop(self, sequence: Sequence) -> None:
        """It has left the board, or never was on it."""
        self._compiling.pop(sequence.id, None)
        self._matchers.pop(sequence.id, None)
        if (lease := self._leases.pop(sequence.id, None)) is not None:
            self._accounts.ledger.release(lease)

    def advance(self, sequence: Sequence, id_: int) -> Verdict:
        """The next id of the answer; without a grammar nothing is said of it."""
        if (matcher := self._matchers.get(sequence.id)) is None:
            return {}
        matcher.consume_token(id_)
        return _verdict(matcher)

    def masks(self, rows: Iterable[Sequence]) -> tuple[list[Mask], list[tuple[Sequence, Verdict]]]:
        """Which ids each row may draw next, where a grammar says so; and the rows that end for want of one.

        Rows that have ended in the meantime may draw anything.
        """
        masks: list[Mask] = []
        ended = []
        for at, sequence in enumerate(rows):
            if (matcher := self._matchers.get(sequence.id)) is not None:
                mask = matcher.compute_bitmask()
                if matcher.is_error():
                    ended.append((sequence, _verdict(matcher)))
                else:
                    masks.append((at, bytes(mask)))
        return masks, ended

    def _compile(self, work: Future[Any], grammar: str, answer: list[int]) -> None:
        """In a thread of its own, that nobody has to wait for: a matcher at the end of `answer`."""
        from llguidance import LLMatcher, LLParserLimits

        try:
            with self._loading:
                if self._tokenizer is None:
                    self._tokenizer = self._load()
            limits = LLParserLimits(**GRAMMAR_LIMITS)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
            matcher.consume_tokens(answer)
            work.set_result(matcher)
        except Exception as error:  # whatever a library says of a file or a grammar: one request's failure
            work.set_exception(error)

    def _tokenizer_bytes(self) -> int:
        file = self._folder / "tokenizer.json"
        return PER_FILE_BYTE * file.stat().st_size if file.is_file() else 0

    def _load(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        words = _Vocabulary(self._folder / "tokenizer.json", self._eos_ids)
        width = max(self._vocab_size, len(words.tokens))
        wrapped = TokenizerWrapper(words)
        words.tokenizer = LLTokenizer(wrapped, n_vocab=width, eos_token=self._eos_ids, slices=[])
        return words.tokenizer


class _Vocabulary:
    """The tokenizer as llguidance asks for it: an added token that is not special is plain text, as to us."""

    bos_token_id = None
    tokenizer: Any = None

    def __init__(self, file: Path, eos_ids: list[int]) -> None:
        self.tokens, special = vocabulary(file)
        self.special_token_ids = sorted(special.union(eos_ids))
        self.eos_token_id = eos_ids[0]

    def __call__(self, text: str) -> Any:
        """How text that the grammar forces is spelt: by the longest tokens from the left on."""
        return self.tokenizer.greedy_tokenize(text)


def _verdict(matcher: Any) -> Verdict:
    if matcher.is_error():
        return _broken(str(matcher.get_error()))
    return {"reason": "stop"} if matcher.is_stopped() else {}


def _broken(problem: str) -> Verdict:
    reason = problem.partition("\n")[0][:200]
    message = f"The answer's grammar can't be followed: {reason}."
    return {"reason": "error", "kind": "INVALID_FIELD", "message": message}
