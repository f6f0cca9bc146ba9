"""The prompt cache of a server that nobody told a limit: bounded, and given up before anything fails."""

from __future__ import annotations

from bench.models import prompt_text
from tests.support.whole_server import Books, WholeServer, all_at_once

MOST_SESSIONS = 60
"""At 1,600 tokens and 32 KB a token, they hold about twice what the limit leaves."""


def test_limits_its_cache_by_default(reported: WholeServer) -> None:
    """Sessions that together hold more than the memory: each is answered and stored, within the bound."""
    with Books(reported) as books:
        for start in range(0, MOST_SESSIONS, 4):
            prompts = [prompt_text(1600, 500 + start + i) for i in range(4)]
            assert all(a.answered for a in all_at_once(lambda text: reported.ask(text, 2), prompts))
            if reported.health()["memory"]["counts"].get("evict"):
                break
        else:
            raise AssertionError("nothing had to go: the sessions do not fill the memory")
    health = reported.health()
    memory = health["memory"]
    assert 0 < memory["accounts"]["cached"] < memory["ceiling"]
    assert books.most_held <= books.ceiling
    assert health["engine_deaths"] == 0
    again = reported.ask(prompts[-1], 2)
    assert again.body["usage"]["prompt_tokens_details"]["cached_tokens"] > 1500


def test_evicts_before_the_device_fails(reported: WholeServer) -> None:
    """A prompt that needs half of the memory comes when the cache has it: the cache gives way."""
    before = reported.health()
    longest = before["max_model_len"]
    answer = reported.ask(prompt_text(longest // 2, 900), 2)
    assert answer.answered, answer
    health = reported.health()
    assert health["engine_deaths"] == 0
    assert health["memory"]["counts"]["evict"] > before["memory"]["counts"].get("evict", 0)
    assert health["memory"]["counts"].get("giveup", 0) == 0
