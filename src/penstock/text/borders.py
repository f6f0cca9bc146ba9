"""Where messages begin in a prompt's ids, and where the next turn will leave it: hints for the prompt cache.

Learned once per template from short conversations, then read from the ids. A template that resists gives no
borders; a wrong border costs the cache bytes, never correctness.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from penstock.cache.checkpoints import Markers, borders, learn
from penstock.errors import PenstockError
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

_TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
_NEXT = {"role": "user", "content": "next"}


def learned(tokenizer: Tokenizer, template: ChatTemplate) -> Markers:
    """What opens and closes messages in this template; empty sets where it resists."""
    renderings = []
    for count in range(1, len(_TALK) + 1):
        try:
            text = template.render(_TALK[:count], None, False, None)
        except PenstockError:
            break
        renderings.append(tokenizer.encode(text, add_special_tokens=template.adds_special_tokens))
    return learn(renderings, tokenizer.special_ids)


def found(
    ids: array[int],
    prompt: str,
    markers: Markers,
    tokenizer: Tokenizer,
    messages: list[Any],
    render: Callable[[list[Any]], str],
) -> tuple[list[int], int | None]:
    """Borders of a rendered prompt, ascending, and the one at which the next turn will leave it, or None.

    The second by rendering the conversation once more with one more message: what a template strips from its
    history, such as thoughts, it strips from the message in which the two texts first differ.
    """
    edges = borders(ids, markers)
    if not edges or not markers.openers:
        return edges, None
    try:
        later = render([*messages, _NEXT])
    except PenstockError:
        return edges, None
    shared = prompt[: _common(prompt, later)]
    opened = sum(shared.count(tokenizer.token_bytes(id).decode()) for id in markers.openers)
    # The first opener is no border where the prompt begins with it: its message begins at the preamble.
    first = 1 if len(ids) > markers.preamble and ids[markers.preamble] in markers.openers else 0
    place = opened - first - 1
    return edges, edges[place] if 0 <= place < len(edges) else None


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common at their starts."""
    return bisect_left(range(min(len(a), len(b))), True, key=lambda at: a[: at + 1] != b[: at + 1])
