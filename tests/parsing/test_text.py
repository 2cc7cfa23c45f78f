"""Names, captions and messages of others reach a terminal without control characters."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from pipeline.parsing.text import LONGEST_LINE, one_line, printable

ANY = st.text(st.characters(codec=None))


@given(ANY)
def test_no_control_character_is_left(text: str) -> None:
    shown = printable(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in shown)
    assert not any(c in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u2028" for c in shown)
    shown.encode()


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"])))
def test_what_can_be_read_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_escapes_say_which_character_it_was() -> None:
    assert printable("\x1b[31mred\x07 \u202e") == "\\x1b[31mred\\x07 \\u202e"


@given(ANY)
def test_a_message_is_one_line_of_bounded_length(text: str) -> None:
    assert "\n" not in one_line(text)
    assert len(one_line(text * 50)) <= LONGEST_LINE + 60
