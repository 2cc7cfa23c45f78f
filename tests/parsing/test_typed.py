"""A dataclass from plain values has the types and bounds that it declares, or a ParseError names the place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.values.bounds import Ge
from pipeline.errors import ParseError
from pipeline.parsing.typed import build


@dataclass(frozen=True)
class Part:
    name: str
    samples: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    size: tuple[int, int] = (1, 1)
    scale: float = 1.0
    kind: Literal["a", "b"] = "a"
    note: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    free: Any = None
    sure: bool = False


@given(st.builds(Whole, parts=st.lists(st.builds(Part, st.text(), st.integers(0, 2**40)), max_size=3).map(tuple),
                 size=st.tuples(st.integers(), st.integers()), scale=st.floats(allow_nan=False, allow_infinity=False),
                 kind=st.sampled_from("ab"), note=st.none() | st.text(),
                 counts=st.dictionaries(st.text(), st.integers()),
                 free=st.none() | st.integers(), sure=st.booleans()))  # fmt: skip
def test_what_was_stored_is_built_as_it_was(whole: Whole) -> None:
    assert build(Whole, json.loads(json.dumps(dataclasses.asdict(whole)))) == whole


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "parts: missing"),
        ({"parts": [], "more": 1}, "more: no such field"),
        ({"parts": [{"name": "x"}, {"name": 5}]}, r"parts\[1\].name=5: text is wanted"),
        ({"parts": [{"name": "x", "samples": -5}]}, r"parts\[0\].samples=-5: 0 or more"),
        ({"parts": [{"name": "x", "samples": True}]}, "samples=true: a whole number"),
        ({"parts": [{"name": "x", "samples": 1.0}]}, "samples=1.0: a whole number"),
        ({"parts": [{}]}, r"parts\[0\].name: missing"),
        ({"parts": [{"name": "x", "{0}": 1}]}, r"parts\[0\].\{0\}: no such field"),
        ({"parts": {}}, "parts=.*: a list is wanted"),
        ({"parts": "x"}, "parts=x: a list is wanted"),
        ({"parts": [], "size": [1]}, "size=.*: a list of 2"),
        ({"parts": [], "scale": float("nan")}, "scale=nan: a finite number"),
        ({"parts": [], "scale": "1"}, "scale=1: a finite number"),
        ({"parts": [], "scale": 10**5000}, "scale=.*: a finite number"),
        ({"parts": [], "kind": "c"}, "kind=c: one of a, b"),
        ({"parts": [], "note": 3}, "note=3: text is wanted"),
        ({"parts": [], "counts": {"x": "y"}}, "counts.x=y: a whole number"),
        ({"parts": [], "sure": 1}, "sure=1: true or false"),
        ([], "it=.*: a group of keys"),
        (None, "it=null: a group of keys"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(value: Any, says: str) -> None:
    with pytest.raises(ParseError, match=says):
        build(Whole, value)


def test_fields_of_a_newer_version_are_passed_over_where_the_reader_says_so() -> None:
    value = {"parts": [{"name": "x", "later": 1}], "newer": {"a": []}}
    assert build(Whole, value, unknown="pass") == Whole(parts=(Part("x"),))
