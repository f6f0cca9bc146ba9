"""Honest answers where a request, or a model, can't be served; and everybody else is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from bench.models import prompt_text
from tests.support.whole_server import PENSTOCK, Books, WholeServer, all_at_once


def test_answers_http_error_when_it_cannot_serve(reported: WholeServer) -> None:
    """More than the memory could ever hold: a 400 at once, with the numbers; the next one is served."""
    most = reported.health()["max_model_len"]
    assert 5_000 < most < 40_000, "the limit from outside, not the model's context, is what bounds it here"
    refused = reported.ask(prompt_text(most, 1), 1)
    assert refused.status == 400
    assert refused.error["code"] == "context_length_exceeded"
    assert f"maximum context length is {most} tokens" in refused.error["message"]
    needed = re.search(r"the prompt has (\d+) tokens", refused.error["message"])
    assert needed
    assert int(needed[1]) > most
    available = re.search(r"([\d.]+) GB, the process's rlimit", refused.error["message"])
    assert available
    assert 1.0 < float(available[1]) < 1.7
    far_more = reported.ask(prompt_text(10 * most, 2), 1)
    assert (far_more.status, far_more.error["code"]) == (400, "context_length_exceeded")
    assert f"maximum context length is {most} tokens" in far_more.error["message"]
    served = reported.ask("Is anybody there?", 4)
    assert served.answered, served
    assert served.body["usage"]["completion_tokens"] == 4


def test_long_prompts_of_a_coding_agent_do_not_end_the_process(reported: WholeServer) -> None:
    """Five sessions of 2,000 to 3,000 tokens, three of them with a second turn: all of it answered."""
    system = prompt_text(700, 1)

    def session(number: int) -> bool:
        history = system + prompt_text(1250 + 240 * number, 100 + number)
        first = reported.ask(history, 4)
        if number > 2:
            return first.answered
        return first.answered and reported.ask(history + prompt_text(200, 200 + number), 4).answered

    with Books(reported) as books:
        answered = all_at_once(session, range(5))
    assert answered == [True] * 5, reported.log()[-3000:]
    assert books.seen > 0
    assert books.most_held <= books.ceiling
    health = reported.health()
    assert health["engine_deaths"] == 0
    assert health["open"] == 0
    assert health["memory"]["counts"].get("giveup", 0) == 0


def test_requests_that_do_not_fit_together_take_turns(
    wide: Path, measured: dict[str, str], tmp_path: Path
) -> None:
    """A device with a 500 MB working set, and 12 requests that need 730 MB together."""
    limit = 500_000_000
    pretended = {"PENSTOCK_PRETEND": f'{{"device": {limit}, "physical": "8G"}}'}
    with WholeServer(wide, tmp_path, environment={**measured, **pretended}) as server:
        with Books(server) as books:
            answers = all_at_once(lambda seed: server.ask(prompt_text(239, seed), 200), range(12))
        assert all(answer.answered for answer in answers), server.log()[-3000:]
        assert {answer.body["usage"]["prompt_tokens"] for answer in answers} == {258}
        assert {answer.body["usage"]["completion_tokens"] for answer in answers} == {200}
        assert 200_000_000 < books.most_held <= books.ceiling < limit
        assert books.resident_peak <= limit, "and the system says the same"
        assert server.health()["engine_deaths"] == 0


def refusal_of(model: Path, limit: str) -> str:
    """What a server says on stderr that does not come up under this --memory-limit."""
    done = subprocess.run(
        [*PENSTOCK, "serve", str(model), "--port", "0", "--memory-limit", limit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "ready" not in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_limit_that_holds_the_weights_and_little_more_is_refused(wide: Path) -> None:
    size = sum(path.stat().st_size for path in wide.glob("*.safetensors"))
    for limit in (size + 1_000, size + 40_000):
        assert "leave too little of" in refusal_of(wide, str(limit))


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(wide: Path) -> None:
    """17.7 MB of weights for a device that may hold 12."""
    told = "the model's weights take 17.7 MB, but only 12.0 MB may be used (--memory-limit)"
    assert told in refusal_of(wide, "12MB")
