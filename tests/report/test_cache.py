"""The prompt cache of a server that nobody told a limit: bounded, and given up before anything fails."""

from __future__ import annotations

import pytest
from bench.models import prompt_text
from tests.support.whole_server import Books, WholeServer, all_at_once

MOST_SESSIONS = 104
"""At 419 tokens and 32 KB a token, they hold about twice what the limit leaves."""


@pytest.fixture(scope="module")
def books(small: WholeServer) -> Books:
    """Sessions that together hold more than the memory: each is answered and stored; watched meanwhile."""
    with Books(small) as books:
        for start in range(0, MOST_SESSIONS, 4):
            prompts = [prompt_text(400, 500 + start + i) for i in range(4)]
            assert all(a.answered for a in all_at_once(lambda text: small.ask(text, 2), prompts))
            if small.health()["memory"]["counts"].get("evict"):
                return books
    raise AssertionError("nothing had to go: the sessions do not fill the memory")


def test_limits_its_cache_by_default(small: WholeServer, books: Books) -> None:
    last = prompt_text(1600, 1)
    assert small.ask(last, 2).answered
    health = small.health()
    memory = health["memory"]
    assert 0 < memory["accounts"]["cached"] < memory["ceiling"]
    assert books.most_held <= books.ceiling
    assert health["engine_deaths"] == 0
    again = small.ask(last, 2)
    assert again.body["usage"]["prompt_tokens_details"]["cached_tokens"] > 1500


def test_evicts_before_the_device_fails(small: WholeServer, books: Books) -> None:
    """A prompt that needs half of the memory comes when the cache has it: the cache gives way."""
    before = small.health()
    longest = before["max_model_len"]
    answer = small.ask(prompt_text(longest // 2, 900), 2)
    assert answer.answered, answer
    health = small.health()
    assert books.seen > 0
    assert health["engine_deaths"] == 0
    assert health["memory"]["counts"]["evict"] > before["memory"]["counts"].get("evict", 0)
    assert health["memory"]["counts"].get("giveup", 0) == 0
