"""The prompt cache at work: between the tree (what is where), the store (arrays) and the books (bytes).

A row that lives is lent to the tree, which reads from it between steps; when its sequence ends, what is new
in it is copied into segments, or, where there is no room for a copy, its buffers themselves become the
tree's. A hit copies a prefix once, into the new row's own buffers. Bytes are reserved before they are
there, under the account CACHED, or STATES for those that a row passes and a stop string may end it at.
Invariant: what is published was read cleanly and is never written again.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

import mlx.core as mx
from msgspec import structs

from penstock import wire
from penstock.cache import store
from penstock.cache.checkpoints import positions
from penstock.cache.nodes import Cover
from penstock.cache.summary import summary
from penstock.cache.tree import Cut, Match, Stored, Tree
from penstock.engine.accounts import Accounts
from penstock.engine.batch import Runner
from penstock.engine.rows import Row
from penstock.engine.scheduler import LOOK_AHEAD, Admit, Evict
from penstock.engine.sequence import Sequence
from penstock.memory.ledger import Account, Lease, LedgerError

log = logging.getLogger("penstock.engine")

STRIDE = 16
"""Ids of an answer between the states that a row with stop strings keeps of it."""
PASSED = 3
"""How many of them, the latest: the front hears of a stop string's end when the row has gone on."""
GRACE = 30.0
"""Seconds in which an agent's next turn is expected: its tools' time."""
STOP = 8
"""Ids that a stop string may have: the next turn leaves the path before them."""


class PromptCache:
    """What the loop asks for and tells of its rows. `enabled` is False where a cache class has no rule."""

    def __init__(
        self,
        runner: Runner,
        accounts: Accounts,
        *,
        max_bytes: int | None = None,
        max_entries: int | None = None,
    ) -> None:
        sample = runner.open(1)
        mx.eval(runner.prefill(sample, [0]))
        self.obstacle = store.obstacle(sample)
        stateful = store.needs_snapshots(sample)
        runner.close(sample)
        self.runner = runner
        self.accounts = accounts
        self.costs = accounts.costs
        self.enabled = self.obstacle is None and max_bytes != 0 and max_entries != 0
        state_tokens = self.costs.fixed // self.costs.kv_per_token if self.costs.kv_per_token else 1
        self.tree = Tree(stateful, max(1, state_tokens), max_bytes, max_entries)
        self._stored: Lease = accounts.ledger.take(Account.CACHED, 0, 0, accounts.ceiling)
        self._passed: dict[int, list[store.Snapshot]] = {}
        self._passing: Lease = accounts.ledger.take(Account.STATES, 0, 0, accounts.ceiling)
        self._buffers = 0
        self._covers: dict[int, Cover] = {}
        self._adopted: dict[Row, tuple[Cover, Lease]] = {}
        self._now = self._clock = 0.0
        self._changes = 0
        self._left: deque[tuple[float, int]] = deque()
        self._wanted = 0
        self._evicted = Counter(memory=0, budget=0, cleared=0)

    @property
    def evictable(self) -> int:
        """Bytes that `evict` could free now."""
        return self.tree.evictable + self._passing.size if self.enabled else 0

    @property
    def recent(self) -> int:
        """Of `evictable`, roughly, what rows left in the last `GRACE` seconds or somebody waits for."""
        return min(self.evictable, self._wanted + sum(size for _, size in self._left))

    # -- rows come -----------------------------------------------------------------------------------

    def look(self, sequences: Iterable[Sequence], clock: float) -> None:
        """How much of those that wait is there (`found`), which keeps it; anew as rows come and go."""
        while self._left and self._left[0][0] < clock - GRACE:
            self._left.popleft()
        self._clock, self._wanted = clock, 0
        for sequence in islice((s for s in sequences if not s.entered), LOOK_AHEAD):
            if self.enabled and sequence.looked != self._changes:
                sequence.looked = self._changes
                sequence.found = self.tree.want(sequence.namespace, sequence.tokens[:-1], self._now)
            self._wanted += sequence.found * self.costs.kv_per_token

    def enter(self, sequence: Sequence, sequences: Iterable[Sequence]) -> None:
        """A row that is about to be prefilled: fill it with the longest prefix that is there, and lend it.

        `sequences`: all, for what the other rows have computed.
        """
        sequence.entered = True
        self._changes += 1
        if not self.enabled:
            sequence.why = "not cached" if self.obstacle else "off"
            return
        for other in sequences:
            self._extend(other)
        self._now += 1
        match = self._match(sequence)
        self._covers[sequence.id] = self.tree.lend(sequence.namespace, sequence.row)
        if match.usable:
            self._fill(sequence, match)
            sequence.launched = sequence.computed = match.usable
        sequence.cached, sequence.why = match.usable, match.why
        self._extend(sequence)
        if self.tree.stateful:
            parted = match.length if match.usable < match.length < len(sequence.tokens) - 1 else None
            wanted = positions(
                sequence.prompt_length,
                sequence.borders,
                match.usable,
                parted,
                self.tree.state_tokens,
                sequence.turn,
            )
            sequence.cuts = [position for position in wanted if position < len(sequence.tokens)]

    def _fill(self, sequence: Sequence, match: Match) -> None:
        """Copy what was found into the row; or move it, if that was promised (`reuse`)."""
        runs = [store.run(store.Part(*piece)) for piece in self.tree.pieces(match)]
        pin = self.tree.pin(match, self._now)
        try:
            if not sequence.reuse:
                store.assemble(sequence.row, runs)
        finally:
            self._free(self.tree.unpin(pin, self._now))
        if sequence.reuse:
            if not self._room(self.costs.taking(sequence.capacity)):
                raise LedgerError("no room for a layer of what is taken over")
            cover = self._covers[sequence.id]
            self.tree.extend(cover, sequence.tokens[: match.usable], self._now)
            self._free(self.tree.give(cover))
            sequence.reuse = 0
            self.accounts.entered(sequence)
            store.separate(runs)
            store.assemble(sequence.row, runs)
        if match.checkpoint is not None:
            store.restore(sequence.row, match.checkpoint.handle)

    def _match(self, sequence: Sequence) -> Match:
        # The last id is always computed: it gives the logits.
        return self.tree.match(sequence.namespace, sequence.tokens[: len(sequence.tokens) - 1])

    def reached(self, sequence: Sequence) -> None:
        """A chunk was read cleanly: keep the state if this is where one was wanted."""
        sequence.row.settle()
        if sequence.computed in sequence.cuts and sequence.computed == sequence.row.length:
            self._keep(sequence, anchor=sequence.computed in (sequence.turn, *sequence.borders[:1]))

    def passing(self, rows: Iterable[Sequence]) -> None:
        """Before a decode step: keep the states that the next turn starts from if a stop string ends this.

        When the string is found the row has gone on, so they are kept in passing.
        """
        for s in rows:
            due = s.stops and s.launched % STRIDE == 0 and s.launched > s.prompt_length
            if due and s.id in self._covers and self.tree.stateful and self._room(self.costs.row(0)):
                self._passed[s.id] = [*self._passed.get(s.id, []), self._snapshot(s, s.launched)][-PASSED:]
                self._count()

    def stopped(self, sequence: Sequence, keep: int) -> None:
        """It ends: its first `keep` ids count; where strings may end it, the last ones are the string's."""
        if not sequence.stops:
            return
        del sequence.tokens[max(keep, sequence.prompt_length) :]
        cover = self._lent(sequence)
        before = [t for t in self._passed.pop(sequence.id, []) if t.position <= len(sequence.tokens) - STOP]
        if cover is not None and before and before[-1].position <= cover.length:
            self._publish(cover, before[-1], anchor=False)

    # -- rows go -------------------------------------------------------------------------------------

    def leave(self, sequence: Sequence) -> None:
        """The sequence has ended, was read cleanly, and its row is not needed: publish and free it."""
        self._changes += 1
        try:
            self._leave(sequence)
        except RuntimeError:
            self.rescue(sequence)
            raise

    def _leave(self, sequence: Sequence) -> None:
        cover = self._lent(sequence)
        if cover is None:
            self._close(sequence)
            return
        self._left.append((self._clock, self.costs.kv_per_token * cover.length))
        if self.tree.stateful and 0 < cover.length == sequence.row.length:
            self._keep(sequence, anchor=False)
        self._passed.pop(sequence.id, None)
        room_for_layer = self.costs.layer_per_token * cover.length
        if (lacking := room_for_layer - self.accounts.ledger.room) > 0:
            self.evict(lacking)
        copies = self._copies(cover, sequence.row)
        del self._covers[sequence.id]
        if copies is None:
            self._adopt(sequence, cover)
        else:
            self._free(self.tree.drop(cover, self._now, copies))
            self._close(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """The row's memory moves to the cache as it is; nothing is allocated."""
        cover = self._lent(sequence)
        if cover is None or not cover.length:
            self.forget(sequence)
            return
        del self._covers[sequence.id]
        self._passed.pop(sequence.id, None)
        self._adopt(sequence, cover)

    def rescue(self, sequence: Sequence) -> None:
        """A step with the row failed, and MLX is clean again: keep what was read before, if it is there."""
        try:
            if sequence.row is not None and sequence.row.is_intact:
                self.preempt(sequence)
        except RuntimeError:
            log.debug("what a failed step's row holds could not be kept", exc_info=True)
        if sequence.row is not None:
            self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Nothing of the row may be believed, or nothing is there: drop it."""
        cover = self._covers.pop(sequence.id, None)
        self._passed.pop(sequence.id, None)
        if cover is not None:
            self._free(self.tree.drop(cover, self._now))
        self._close(sequence)

    # -- room ----------------------------------------------------------------------------------------

    def set_budget(self, size: int) -> None:
        """A fall takes what nobody waits for at once; the next plan does the rest."""
        self.accounts.set_budget(size)
        if self.accounts.ledger.room < 0:
            self.accounts.clear_pool()
        if self.accounts.ledger.room < 0:
            self.evict(-self.accounts.ledger.room, "budget")

    def promises(self, measure: Admit | Evict) -> bool:
        """Whether it has just promised a row the bytes of its own prefix, or taken that back."""
        sequence = measure.sequence
        if sequence is None or not (sequence.reuse or isinstance(measure, Evict)):
            return False
        match = self._match(sequence)
        reuse = self.tree.reusable(match)
        if isinstance(measure, Admit):
            kept, sequence.reuse = sequence.reuse <= reuse, min(sequence.reuse, reuse)
            return not kept
        if sequence.reuse or reuse <= self.costs.taking(sequence.first_capacity):
            return False
        sequence.reuse = reuse
        return True

    def evict(self, size: int, reason: str = "memory", keep: Sequence | None = None) -> None:
        """Free at least `size` bytes if that many can go, the least valuable first.

        What `keep` can start from goes last; then nothing is promised to it any more.
        """
        if keep is None:
            self._evict(size, reason)
            return
        pin = self.tree.hold(self._match(keep))
        try:
            size -= self._evict(size, reason)
        finally:
            self._free(self.tree.unpin(pin, self._now))
        if size > 0:
            self._evict(size + keep.reuse, reason)
            keep.reuse = 0

    def _evict(self, size: int, reason: str) -> int:
        self._passed.clear()
        self._changes += 1
        before, passing = self.tree.evicted_bytes, self._passing.size
        self._free(self.tree.evict(size - passing, self._now))
        self._evicted[reason] += self.tree.evicted_bytes - before
        return passing + self.tree.evicted_bytes - before

    def tidy(self) -> None:
        """With nothing else to do: pack what was adopted, where there is room for the copies."""
        for row, (cover, _) in list(self._adopted.items()):
            try:
                copies = self._copies(cover, row)
            except RuntimeError:
                if not row.is_intact:
                    self._free(self.tree.drop(cover, self._now))
                raise
            if copies is None:
                return
            self._free(self.tree.pack(cover, copies, self._now))

    def leases(self) -> list[Lease]:
        """What it holds, for the audit."""
        return [self._stored, self._passing, *(lease for _, lease in self._adopted.values())]

    def clear(self) -> None:
        """Drop everything that no live row holds."""
        self.evict(self.evictable, "cleared")

    def books(self) -> wire.Cached:
        """What is there, and what went: for memory that was needed, a lower budget, caps, or by order."""
        caps = self.tree.evicted_bytes - self._evicted.total()
        return structs.replace(summary(self.tree, self._now), evicted={**self._evicted, "caps": caps})

    # -- inside --------------------------------------------------------------------------------------

    def _lent(self, sequence: Sequence) -> Cover | None:
        """The sequence's cover, up to what is computed."""
        self._extend(sequence)
        return self._covers.get(sequence.id)

    def _extend(self, sequence: Sequence) -> None:
        cover = self._covers.get(sequence.id)
        if cover is None:
            return
        while ids := sequence.tokens[cover.length : sequence.computed]:
            cut = self.tree.extend(cover, ids, self._now)
            if cut is not None and not self._cut(cut):
                break
        self._free(self.tree.shed(cover, self._now))

    def _cut(self, cut: Cut) -> bool:
        """Copy a segment in two; False if there is no room for the copies."""
        rounding = 2 * len(cut.segment.handle.arrays) * self.costs.rounding // self.costs.buffers
        if not self._room(cut.segment.size + rounding):
            return False
        first, rest = store.cut(cut.segment.handle, cut.at)
        self._buffers += len(first.arrays) + len(rest.arrays)
        self._free(self.tree.cut(cut, (first, first.size), (rest, rest.size), self._now))
        return True

    def _keep(self, sequence: Sequence, *, anchor: bool) -> None:
        cover = self._lent(sequence)
        if cover is None or cover.length != sequence.computed or not self._room(self.costs.row(0)):
            return
        self._publish(cover, self._snapshot(sequence, sequence.computed), anchor=anchor)

    def _snapshot(self, sequence: Sequence, position: int) -> store.Snapshot:
        return store.snapshot(sequence.row, position, self.runner.states(sequence.row))

    def _publish(self, cover: Cover, taken: store.Snapshot, *, anchor: bool) -> None:
        self._buffers += taken.buffers
        self._free(self.tree.keep(cover, taken.position, taken, taken.size, self._now, anchor))

    def _copies(self, cover: Cover, row: Row) -> list[Stored] | None:
        """Segments of what nobody else holds, to be kept all at once: a cap may take some of them again.

        None where there is not even room for those of one layer at a time.
        """
        runs = self.tree.unpacked(cover)
        ids = sum(count for _, count in runs)
        if self._room(self.costs.kv_per_token * ids + self.costs.rounding):
            made = [store.pack(row, start, count) for start, count in runs]
        elif self._room(self.costs.layer_per_token * ids):
            made = store.move(row, runs)
        else:
            return None
        self._buffers += sum(len(segment.arrays) for segment in made)
        return [(segment, segment.count, segment.size) for segment in made]

    def _room(self, size: int) -> bool:
        return self.accounts.ledger.can_reserve(size)

    def _adopt(self, sequence: Sequence, cover: Cover) -> None:
        row = sequence.row
        kept = self.costs.row(sequence.capacity) - self.costs.fixed
        lease = self.accounts.adopt(sequence, kept, 2 * len(row.kv))
        self.runner.detach(row)
        sequence.row = None
        self._adopted[row] = cover, lease
        self._free(self.tree.adopt(cover, row, kept, self._now))

    def _close(self, sequence: Sequence) -> None:
        self.runner.close(sequence.row)
        sequence.row = None
        self.accounts.leave(sequence)

    def _free(self, handles: Iterable[Any]) -> None:
        """Let go of what the tree no longer needs, and bring the books in line."""
        for handle in handles:
            if isinstance(handle, Row):
                if handle in self._adopted:
                    self.accounts.ledger.release(self._adopted.pop(handle)[1])
                    handle.close()
            elif isinstance(handle, store.Segment):
                self._buffers -= len(handle.arrays)
            elif isinstance(handle, store.Snapshot):
                self._buffers -= handle.buffers
        self._count()

    def _count(self) -> None:
        passed = [taken for held in self._passed.values() for taken in held]
        packed = self.tree.bytes - sum(cover.size for cover, _ in self._adopted.values())
        self.accounts.ledger.correct(self._stored, packed, self._buffers)
        sizes = sum(taken.size for taken in passed), sum(taken.buffers for taken in passed)
        self.accounts.ledger.correct(self._passing, *sizes)
