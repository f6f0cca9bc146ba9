"""A sequence: the ids of one choice of one request, and how far the engine has come with them.

Owns the three counts that everything else is derived from: `tokens` (prompt and answer, as far as known),
`launched` (how many of them have been fed to a forward pass) and `computed` (how many of those are confirmed
by a clean read). A step makes `launched` and `computed` chase `tokens`: chunked prefill, resumption after an
error and continuation after a crash are all the same. Knows neither MLX nor the clock.

Invariant: computed ≤ launched ≤ len(tokens) + 1 (the one beyond is the input that is still on the device).
"""

from __future__ import annotations

from array import array
from typing import Any

from penstock.engine.draws import NARROW
from penstock.guilt import Accusation
from penstock.memory.costs import CHUNK_FLOOR, FIRST_ROOM, grown
from penstock.wire import Sampling, Submit, unpack_ids


class Sequence:
    """One sequence from its `Submit` to its `Ended`."""

    __slots__ = (
        "accusation",
        "arrival",
        "borders",
        "cached",
        "capacity",
        "compiling",
        "computed",
        "cuts",
        "entered",
        "found",
        "grammar",
        "host_bytes",
        "id",
        "ignore_eos",
        "launched",
        "limit",
        "looked",
        "min_tokens",
        "namespace",
        "overtaken",
        "passed_over",
        "preempted_at",
        "preemptions",
        "prompt_length",
        "reuse",
        "row",
        "sampling",
        "stops",
        "tokens",
        "turn",
        "why",
    )

    def __init__(self, submit: Submit, context_length: int, host_bytes: int = 0) -> None:
        """`host_bytes`: what its grammar takes beside the row."""
        self.id = submit.id
        self.arrival = submit.arrival
        self.sampling: Sampling = submit.sampling
        self.tokens: array[int] = unpack_ids(submit.prompt)
        self.prompt_length = len(self.tokens)
        self.tokens.extend(unpack_ids(submit.delivered))
        self.min_tokens = submit.min_tokens
        self.ignore_eos = submit.ignore_eos
        most = context_length if submit.max_tokens is None else self.prompt_length + submit.max_tokens
        self.limit = min(most, context_length)
        self.launched = 0
        self.computed = 0
        self.accusation = Accusation((0, submit.apart), apart=True) if submit.apart else None
        self.passed_over = 0
        self.overtaken = 0
        self.namespace = submit.namespace
        self.borders = submit.borders
        self.turn = submit.turn
        self.stops = submit.stops
        self.grammar = submit.grammar
        self.compiling = bool(submit.grammar)
        self.host_bytes = host_bytes
        self.entered = False
        self.found, self.looked = 0, -1  # ids in the cache while it waits; when that was looked up
        self.reuse = 0  # bytes of the cache that its row takes over
        self.cached = 0
        self.why = ""
        self.cuts: list[int] = []
        self.row: Any = None
        self.capacity = 0
        self.preempted_at: int | None = None
        self.preemptions = 0

    @property
    def prefill_left(self) -> int:
        """Ids to compute before the next one can be drawn: all but the last, which a decode step takes."""
        return max(0, len(self.tokens) - 1 - self.launched)

    @property
    def expected_prefill(self) -> int:
        """Ids that it will have to prefill: before it has looked into the cache, less what was seen there."""
        return self.prefill_left if self.entered else max(0, self.prefill_left - self.found)

    @property
    def steps_left(self) -> int:
        """Steps in which it has ended, if it need not wait for others' chunks."""
        return -(-self.prefill_left // CHUNK_FLOOR) + self.limit - max(len(self.tokens), self.launched)

    @property
    def decodable(self) -> bool:
        """Whether a decode step may take it: its input is known or on the device, and the draw counts."""
        return self.prefill_left == 0 and self.launched + 2 <= self.limit and not self.compiling

    @property
    def until_cut(self) -> int:
        """Ids up to the next position where a chunk has to end, so that the state there can be kept."""
        return next((cut for cut in self.cuts if cut > self.launched), len(self.tokens)) - self.launched

    @property
    def apart(self) -> bool:
        """Whether it is suspected of an error or a death at ids that it has not passed yet."""
        held = self.accusation
        return held is not None and held.apart and not held.passed(self.computed)

    @property
    def input_on_device(self) -> bool:
        """Whether the next input is the draw of the step in flight, not yet known to the host."""
        return self.launched == len(self.tokens)

    @property
    def must_go_on(self) -> bool:
        """Whether the draw that was launched last may not end the answer yet (`min_tokens`).

        Where a grammar says when an answer is complete, it alone does.
        """
        return self.launched - self.prompt_length < self.min_tokens and not self.grammar

    @property
    def costly_draw(self) -> bool:
        """Whether its draws hold more than others': XTC sorts the vocabulary twice, a mask is as wide."""
        return self.sampling.xtc_probability > 0 or bool(self.grammar)

    @property
    def lean_draw(self) -> bool:
        """Whether its draws hold less than others': greedy and narrow ones, of logits as they are."""
        s = self.sampling
        changed = s.logit_bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
        return not self.costly_draw and not changed and (s.temperature == 0 or 0 < s.top_k <= NARROW)

    @property
    def comes_back(self) -> bool:
        """Whether the cache saves most of its prefill, by the last look (`found`) while it waits."""
        return 2 * self.found >= len(self.tokens)

    @property
    def first_capacity(self) -> int:
        """Ids that its row is opened for: the prompt and the answer's first part, or what it has grown to."""
        first = min(self.prompt_length + FIRST_ROOM, self.limit)
        return first if len(self.tokens) < first else self.least_capacity

    @property
    def least_capacity(self) -> int:
        """The least that it can start with: what is known of it and one growth step."""
        return min(grown(len(self.tokens)), self.limit)

    def preempt(self, departures: int) -> None:
        """Its row was taken; `departures` rows had left by then."""
        self.restart()
        self.preempted_at = departures
        self.preemptions += 1

    def may_return(self, departures: int) -> bool:
        """Whether enough have left since: each time one more, or growth of others would undo its work."""
        return self.preempted_at is None or departures >= self.preempted_at + self.preemptions

    def restart(self) -> None:
        """Forget what was computed: the ids stay, everything is to be computed again."""
        self.row = None
        self.entered = False
        self.reuse = 0
        self.cuts = []
        self.capacity = 0
        self.launched = 0
        self.computed = 0
        self.compiling = bool(self.grammar)

    def finish_reason(self, eos_ids: frozenset[int]) -> str | None:
        """Why it ends with its last id: 'stop' (end-of-turn id), 'length', or None if it goes on."""
        if len(self.tokens) == self.prompt_length:
            return None
        if not self.ignore_eos and self.tokens[-1] in eos_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None
