"""The scheduler alone: sequences with made-up rows, a runner that only counts."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.scheduler import CHUNK_FLOOR, Facts, account, choose_prompt, schedule
from penstock.engine.sequence import Sequence
from penstock.wire import Sampling, Submit


def sequence(id_: int, length: int, *, arrival: int | None = None, max_tokens: int | None = 8) -> Sequence:
    prompt = array("I", range(length)).tobytes()
    submit = Submit(
        id=id_,
        prompt=prompt,
        sampling=Sampling(),
        arrival=id_ if arrival is None else arrival,
        max_tokens=max_tokens,
    )
    return Sequence(submit, context_length=100_000)


FACTS = Facts(decode_concurrency=4, prompt_concurrency=2, chunk_longest=2048, stall_target=0.2)


def run(sequences: list[Sequence], facts: Facts, *, steps: int = 10_000) -> list[tuple[int, int]]:
    """Play the plans; returns (sequence id, chunk length) of every prefill chunk."""
    chunks = []
    for _ in range(steps):
        if not sequences:
            break
        plan = schedule(sequences, facts)
        assert plan, "sequences are left, but nothing is planned"
        for admitted in plan.admit:
            admitted.row = object()
        assert len(plan.decode) <= facts.decode_concurrency
        assert sum(s.row is not None for s in sequences) <= facts.decode_concurrency
        assert sum(s.row is not None and s.prefill_left > 0 for s in sequences) <= facts.prompt_concurrency
        for decoded in plan.decode:
            decoded.launched += 1
            decoded.tokens.append(7)
            decoded.computed = decoded.launched
        if plan.chunk is not None:
            chosen = plan.chunk.sequence
            assert chosen not in plan.decode
            assert 0 < plan.chunk.length <= min(chosen.prefill_left, facts.chunk_longest)
            account(plan.chunk, [s for s in sequences if s.prefill_left])
            chosen.launched += plan.chunk.length
            chunks.append((chosen.id, plan.chunk.length))
        sequences[:] = [s for s in sequences if s.finish_reason(frozenset()) is None]
    assert not sequences, "not everything has ended"
    return chunks


@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=12),
    decode=st.integers(1, 5),
    prompts=st.integers(1, 3),
    speed=st.none() | st.floats(1e-6, 1e-2),
)
@settings(max_examples=150, deadline=None)
def test_every_sequence_ends_within_the_limits(
    lengths: list[int], decode: int, prompts: int, speed: float | None
) -> None:
    facts = Facts(decode, prompts, 2048, 0.2, speed)
    run([sequence(i, n) for i, n in enumerate(lengths)], facts)


def test_waits_in_order_of_arrival() -> None:
    waiting = [sequence(i, 3, arrival=10 - i) for i in range(6)]
    plan = schedule(waiting, FACTS)
    assert [s.id for s in plan.admit] == [5, 4]


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    long, short = sequence(0, 60_000), sequence(1, 200)
    chunks = run([long, short], FACTS)
    assert [id_ for id_, _ in chunks[:2]].index(1) <= 1


def test_the_oldest_prompt_keeps_half_of_the_prefill() -> None:
    long = sequence(0, 60_000)
    long.row = object()
    given_to = {True: 0, False: 0}
    others = [sequence(i, 2000) for i in range(1, 200)]
    for other in others:
        other.row = object()
    prompts = [long, *others]
    while long.prefill_left:
        plan = schedule(prompts, Facts(1000, 1000, 512, 0.2))
        assert plan.chunk is not None
        given_to[plan.chunk.sequence is long] += plan.chunk.length
        account(plan.chunk, [s for s in prompts if s.prefill_left])
        plan.chunk.sequence.launched += plan.chunk.length
        assert given_to[True] >= given_to[False] - 2 * 512
        prompts = [s for s in prompts if s.prefill_left]
    assert given_to[False] > 20_000


def test_the_stall_target_shortens_chunks_only_while_streams_run() -> None:
    long, stream = sequence(0, 60_000), sequence(1, 1, max_tokens=100)
    long.row = stream.row = object()
    facts = Facts(4, 2, 2048, 0.2, seconds_per_prefill_id=0.2 / 600)
    plan = schedule([long, stream], facts)
    assert plan.chunk is not None
    assert (plan.chunk.length, plan.chunk.decided_by) == (600, "stall target")
    alone = schedule([long], facts)
    assert alone.chunk is not None
    assert (alone.chunk.length, alone.chunk.decided_by) == (2048, "prefill_step_size")
    slow = schedule([long, stream], Facts(4, 2, 2048, 0.2, seconds_per_prefill_id=1.0))
    assert slow.chunk is not None
    assert slow.chunk.length == CHUNK_FLOOR


def test_the_least_left_is_chosen_until_the_oldest_was_passed_over() -> None:
    old, new = sequence(0, 5000), sequence(1, 300)
    assert choose_prompt([old, new]) is new
    old.passed_over = 1
    assert choose_prompt([old, new]) is old
