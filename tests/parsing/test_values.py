"""JSON and YAML that others may have written give plain values or a ParseError, in bounded time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ParseError
from pipeline.parsing.values import DEPTH, parse_json, parse_yaml

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_what_json_can_hold_is_read_as_it_was(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(PLAIN)
def test_what_yaml_can_hold_is_read_as_it_was(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 500_000, "nests deeper"),
        (b"[" * (DEPTH + 2) + b"]" * (DEPTH + 2), "nests deeper"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nests deeper"),
        (b"NaN", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"1e999", "float64"),
        (b"1" * 400, "400 digits"),
        (b"-" + b"9" * 5000, "digits"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"nul", "not JSON"),
    ],
)
def test_json_that_is_none_is_refused_in_a_moment(text: bytes, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(ParseError, match=says):
        parse_json(text)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("!!python/object/apply:os.system ['true']", "tag"),
        ("a: !mine 1", "tag"),
        ("a: &x [1]\nb: *x", "anchor"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "anchor"),
        ("[" * 100_000, "nests deeper|not YAML"),
        ("a: .nan", "finite"),
        ("a: -.inf", "finite"),
        (f"a: {10**400}", "64 bits|cannot be read"),
        ("a: 2026-11-29", "date"),
        ("a: !!binary aGk=", "tag"),
        ("? [1]\n: 2", "YAML|key"),
        ("\t- a: [", "not YAML"),
        ("a: \x00", "not YAML"),
        ("a\n---\nb", "not YAML"),
        (b"\xff\xff", "UTF-8"),
        ("x" * (1 << 21), "at most"),
        ("a: 0x" + "f" * 5000, "64 bits|cannot be read"),
    ],
)
def test_yaml_that_does_more_than_hold_values_is_refused_in_a_moment(text: str | bytes, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(ParseError, match=says):
        parse_yaml(text)
    assert time.monotonic() - began < 1


@given(st.binary(max_size=200))
def test_any_bytes_are_values_or_a_parse_error(data: bytes) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(data)
        except ParseError:
            pass


def test_a_text_beyond_the_limit_is_not_parsed() -> None:
    with pytest.raises(ParseError, match="11 bytes, 10 at most"):
        parse_json(b"[1,2,3,4,5]", limit=10)
