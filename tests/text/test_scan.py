from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.text.scan import Patterns

words = st.text("abc", min_size=1, max_size=4)


def by_hand(text: str, strings: list[str]) -> tuple[str, str | None]:
    """What goes out before the first complete match, and the match: one character at a time."""
    for end in range(1, len(text) + 1):
        matches = [string for string in strings if text[:end].endswith(string)]
        if matches:
            match = max(matches, key=len)
            return text[: end - len(match)], match
    return text, None


@given(st.text("abcd", max_size=30), st.lists(words, max_size=4), st.lists(st.integers(1, 5)))
def test_cuts_do_not_change_what_is_found(text: str, strings: list[str], sizes: list[int]) -> None:
    patterns, out, held, match, rest = Patterns(strings), "", "", None, text
    for size in [*sizes, len(text)]:
        part, rest = rest[:size], rest[size:]
        cut, match = patterns.scan(held + part)
        out, held = out + (held + part)[:cut], (held + part)[cut:]
        if match:
            break
    expected, expected_match = by_hand(text, strings)
    assert match == expected_match
    assert (out if match else out + held) == expected


@given(st.text("abcd", max_size=12), st.lists(words, max_size=4))
def test_keeps_back_only_what_can_become_a_match(text: str, strings: list[str]) -> None:
    cut, match = Patterns(strings).scan(text)
    if match is None:
        held = text[cut:]
        assert not held or any(string.startswith(held) and string != held for string in strings)
        longer = [text[start:] for start in range(cut)]
        assert not any(string.startswith(suffix) for suffix in longer for string in strings)


def test_the_match_that_is_complete_first_wins() -> None:
    assert Patterns(["abcd", "c"]).scan("abcd") == (2, "c")
    assert Patterns(["b", "ab"]).scan("ab") == (0, "ab")


def test_empty_strings_and_letters_with_a_meaning_in_expressions() -> None:
    assert Patterns([""]).scan("x") == (1, None)
    assert Patterns(["]x", "^y", "\\"]).scan("a^y") == (1, "^y")
    assert Patterns(["-", "]"]).scan("a.z]") == (3, "]")
