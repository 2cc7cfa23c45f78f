"""Classes and names: strict at encode, helpful at sampling."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.conditions.classes import class_of, read_class
from pipeline.conditions.facts import ClassFacts
from pipeline.conditions.names import read_names
from pipeline.errors import ConfigError, RecordRejected

NAMED = ClassFacts(count=4, key="json:label", names=("tench", "crane", "7", "crane"))


def reason(cls: bytes | None, columns: Any, facts: ClassFacts) -> str:
    with pytest.raises(RecordRejected) as rejection:
        read_class(cls, columns, facts)
    assert "\n" not in str(rejection.value)
    assert len(str(rejection.value)) < 400
    return rejection.value.reason


@given(st.integers(0, 999))
def test_a_cls_member_is_a_whole_number_in_ascii(number: int) -> None:
    for text in (f"{number}", f" {number}\n", f"+{number}", f"00{number}"):
        cls = read_class(text.encode(), None, ClassFacts(count=1000))
        assert cls.dtype == np.int32
        assert cls.shape == ()
        assert cls == number


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (None, "class_missing"),
        (b"1000", "class_out_of_range"),
        (b"-1", "class_out_of_range"),
        (b"999999999999999999", "class_out_of_range"),
        (b"", "class_unreadable"),
        (b"1.0", "class_unreadable"),
        (b"1 2", "class_unreadable"),
        (b"tench", "class_unreadable"),
        (b"9" * 10_000_000, "class_unreadable"),
        ("\u0663".encode(), "class_unreadable"),
        (b"\x00\xff", "class_unreadable"),
        (b"1_0", "class_unreadable"),
        (b"0x1", "class_unreadable"),
    ],
)
def test_a_cls_member_that_is_no_class_is_a_counted_reason(cls: bytes | None, why: str) -> None:
    assert reason(cls, {"cls": 1}, ClassFacts(count=1000)) == why


@pytest.mark.parametrize(("value", "number"), [(3, 3), (3.0, 3), ("3", 3), (" 0 ", 0), ("tench", 0), ("7", 2)])
def test_a_json_column_holds_a_number_or_a_name(value: Any, number: int) -> None:
    """A class that is called 7 is meant by "7"; a number is never a name."""
    assert read_class(b"1", {"label": value}, NAMED) == number


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "class_missing"),
        (4, "class_out_of_range"),
        (-1, "class_out_of_range"),
        (10**400, "class_out_of_range"),
        (1e308, "class_out_of_range"),
        (True, "class_unreadable"),
        (1.5, "class_unreadable"),
        (float("nan"), "class_unreadable"),
        (float("inf"), "class_unreadable"),
        ([1], "class_unreadable"),
        ({"a": 1}, "class_unreadable"),
        ([[]] * 100_000, "class_unreadable"),
        ("crane", "class_unreadable"),
        ("dog", "class_unreadable"),
        ("x" * 100_000, "class_unreadable"),
        ("\ud800", "class_unreadable"),
    ],
)
def test_a_json_column_that_is_no_class_is_a_counted_reason(value: Any, why: str) -> None:
    assert reason(b"1", {"label": value}, NAMED) == why
    assert reason(b"1", None, NAMED) == "class_missing"


def test_sampling_takes_a_number_or_a_name_and_offers_names_that_are_near() -> None:
    assert [class_of(word, NAMED) for word in (3, "3", "tench", "7", 0)] == [3, 3, 0, 2, 0]
    with pytest.raises(ConfigError, match=r"class tnch: there is no such name, did you mean tench\?"):
        class_of("tnch", NAMED)
    with pytest.raises(ConfigError, match="class crane: 2 have this name, give one of 1, 3"):
        class_of("crane", NAMED)
    with pytest.raises(ConfigError, match="class 4: a number from 0 to 3 is wanted"):
        class_of("4", NAMED)
    with pytest.raises(ConfigError, match="class dog: the model knows no names of its 9, give a number from 0 to 8"):
        class_of("dog", ClassFacts(count=9))
    for word in (-1, 10**400, True, "", "\x1b[31m", "1" * 5000):
        with pytest.raises(ConfigError) as error:
            class_of(word, NAMED)
        assert "\n" not in str(error.value)
        assert "\x1b" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# Files of names

NAMES = st.lists(
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool),
    min_size=1,
    max_size=20,
)


@given(NAMES)
def test_names_are_the_same_from_lines_a_list_and_an_object(names: list[str]) -> None:
    assert read_names("\n".join(names).encode(), "a.txt") == tuple(names)
    assert read_names(json.dumps(names).encode(), "a.json") == tuple(names)
    numbered = json.dumps({str(number): name for number, name in reversed(list(enumerate(names)))})
    assert read_names(numbered.encode(), "a.json") == tuple(names)


def test_lines_may_end_as_on_windows_and_a_file_may_begin_with_a_mark() -> None:
    assert read_names(b"\xef\xbb\xbfa b\r\nc\r\n\r\n") == ("a b", "c")
    assert read_names(b'\xef\xbb\xbf["a"]', "x.json") == ("a",)
    assert read_names(b' ["a", "b"]') == ("a", "b"), "the first character tells, where no ending does"


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "a.txt"),
        (b"\n\n", "a.txt"),
        (b"a\n\nb", "a.txt"),
        (b"a\x00", "a.txt"),
        (b"\xff\xfe", "a.txt"),
        (b"x" * 257, "a.txt"),
        (b"", "a.json"),
        (b"[]", "a.json"),
        (b"{}", "a.json"),
        (b"3", "a.json"),
        (b'["a", 1]', "a.json"),
        (b'["a", null]', "a.json"),
        (b'[["a"]]', "a.json"),
        (b'{"0": "a", "2": "b"}', "a.json"),
        (b'{"a": 0}', "a.json"),
        (b'["a\\nb"]', "a.json"),
        (b'["\\ud800"]', "a.json"),
        (b"[" * 100_000, "a.json"),
        (b"[", "a.json"),
    ],
)
def test_a_file_that_holds_no_names_is_refused_in_one_line(data: bytes, where: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_names(data, where)
    assert str(error.value).startswith(f"{where}: it")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
