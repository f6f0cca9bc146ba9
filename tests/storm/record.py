"""What a storm has shown: figures per step, as lines for people and as fields for programs."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from penstock.memory.audit import TOLERANCE

BIG = 10e6
"""Bytes from which on a chunk's prediction has to be tight and not only safe."""
COPIES = ("assemble", "publish")
"""What the prompt cache does between steps."""


@dataclass
class Record:
    """Figures of one storm."""

    steps: int = 0
    seconds: float = 0.0
    ratios: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """By what a step did: (measured ÷ predicted, measured bytes)."""
    worst_step: str = ""
    worst_copying: str = ""
    largest_share: float = 0.0
    """Of the budget, held by one step's transient."""
    in_use: list[float] = field(default_factory=list)
    """Shares of the budget that were leased when a step was launched while a request waited for bytes."""
    unused: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Shares of the budget that were free then, summed up by what kept them so."""
    tightest: float = 0.0
    """Peak ÷ bound."""
    pool_beyond: int = 0
    """Bytes that the allocator kept above its cap when a step had been read."""
    counts: Counter[str] = field(default_factory=Counter)
    chunk_lengths: set[int] = field(default_factory=set)
    longest_context: int = 0
    broken: list[str] = field(default_factory=list)
    """What passed its bound: a storm goes on, and fails at its end."""

    def expect(self, holds: bool, words: str) -> None:
        """Remember what did not hold."""
        if not holds:
            self.broken.append(words)

    def copied(self, kind: str, measured: int, leased: int, words: str) -> None:
        """Bytes that the prompt cache held more while it copied, and what it had room for."""
        said = f"{kind}, {measured} of {leased} bytes granted: {words}"
        self.expect(measured <= leased + TOLERANCE, said)
        if measured > TOLERANCE:
            ratio = measured / (leased + TOLERANCE)
            if ratio > self.worst(copies=True):
                self.worst_copying = said
            self.ratios[kind].append((ratio, measured))

    def lacks(self, steps: int, context: int) -> list[str]:
        """What a storm of so many steps, with contexts up to so many ids, would need to show something."""
        wanted = {
            f"a transient of a fifth of the budget, not {self.largest_share:.2f}": self.largest_share >= 0.2,
            f"{steps} steps, not {self.steps}": self.steps >= steps,
            f"a context of {context} ids, not {self.longest_context}": self.longest_context >= context,
            f"more than {len(self.chunk_lengths)} chunk lengths": len(self.chunk_lengths)
            >= min(50, steps // 20),
            "no error": not self.counts["errors"],
        }
        for kind in ("shortened", "waits", "preempt"):
            wanted[f"more {kind} than {self.counts[kind]}"] = self.counts[kind] >= 20 * steps // 2_000
        return [what for what, there in wanted.items() if not there]

    def median_in_use(self) -> float:
        return statistics.median(self.in_use) if self.in_use else 0.0

    def median_of_big_chunks(self) -> float:
        """Of steps with a chunk that held more than `BIG` bytes: measured ÷ predicted."""
        big = [r for kind, all_ in self.ratios.items() if "prefill" in kind for r, size in all_ if size > BIG]
        return statistics.median(big) if big else 0.0

    def worst(self, *, copies: bool = False) -> float:
        """Of all steps; or of all copies, which are granted to the byte, with a step's room behind them."""
        some = (ratios for kind, ratios in self.ratios.items() if (kind in COPIES) == copies)
        return max((ratio for ratios in some for ratio, _ in ratios), default=0.0)

    def by_kind(self) -> dict[str, list[tuple[float, int]]]:
        """The ratios of all steps that did a thing, whatever else they did."""
        found: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for kinds, ratios in self.ratios.items():
            for kind in kinds.split(" + "):
                found[kind] += ratios
        return dict(sorted(found.items()))

    def lines(self) -> list[str]:
        found = [
            f"{self.steps} steps in {self.seconds:.0f} s, peak at most {self.tightest:.3f} of the bound, "
            f"transient at most {self.largest_share:.2f} of the budget, {len(self.chunk_lengths)} chunk "
            f"lengths, context to {self.longest_context}, pool {self.pool_beyond} bytes beyond its cap, "
            f"{dict(self.counts)}"
        ]
        if self.in_use:
            found.append(f"in use while requests wait: median {self.median_in_use():.2f}")
            total = sum(self.unused.values())
            shares = [
                f"{why} {share / total:.2f}"
                for why, share in sorted(self.unused.items(), key=lambda pair: -pair[1])
            ]
            found.append(f"  of what was not: {', '.join(shares)}")
        for kind, ratios in self.by_kind().items():
            worst, median = max(r for r, _ in ratios), statistics.median(r for r, _ in ratios)
            found.append(f"{kind:10s} {len(ratios):5d} × worst {worst:.2f} median {median:.2f}")
        if self.worst_step:
            found.append(f"worst: {self.worst_step}")
        if self.worst_copying:
            found.append(f"worst: {self.worst_copying}")
        found += [f"BROKEN ({len(self.broken)} times): {words}" for words in self.broken[:3]]
        if big := self.median_of_big_chunks():
            found.append(f"chunks above {BIG / 1e6:.0f} MB: median {big:.2f}")
        return found

    def fields(self) -> dict[str, Any]:
        kinds = {
            kind: {
                "steps": len(ratios),
                "worst": max(r for r, _ in ratios),
                "median": statistics.median(r for r, _ in ratios),
                "largest_bytes": max(size for _, size in ratios),
            }
            for kind, ratios in self.by_kind().items()
        }
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "peak_by_bound": self.tightest,
            "largest_transient_by_budget": self.largest_share,
            "chunk_lengths": len(self.chunk_lengths),
            "longest_context": self.longest_context,
            "pool_beyond_its_cap_bytes": self.pool_beyond,
            "counts": dict(self.counts),
            "in_use_while_waiting": {"steps": len(self.in_use), "median": self.median_in_use()},
            "unused_by_reason": dict(self.unused),
            "measured_by_predicted": kinds,
            "worst": self.worst(),
            "worst_copy": self.worst(copies=True),
            "worst_step": self.worst_step,
            "worst_copying": self.worst_copying,
            "broken": len(self.broken),
            "breaches": self.broken[:50],
            "median_of_big_chunks": self.median_of_big_chunks(),
        }
