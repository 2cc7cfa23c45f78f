"""The lists of a large JSON object are read as `json` reads them, whatever the pieces, and in little memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ParseError
from preprocess.converting import json_lists
from preprocess.converting.json_lists import JsonLists

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def read(text: str, *names: str) -> list[tuple[str, Any]]:
    return list(JsonLists(io.StringIO(text), names).items())


@given(
    st.dictionaries(TEXTS, st.lists(VALUES, max_size=4), max_size=3),
    VALUES,
    st.integers(1, 40),
    st.sampled_from([None, 1]),
)
@settings(max_examples=60, deadline=None)
def test_every_element_is_the_one_that_json_reads(
    lists: dict[str, list[Any]], other: Any, piece: int, indent: int | None
) -> None:
    whole = {**lists, "other ": other}
    before, json_lists.PIECE = json_lists.PIECE, piece
    try:
        found = read(json.dumps(whole, indent=indent), *lists)
    finally:
        json_lists.PIECE = before
    assert found == [(name, value) for name, values in lists.items() for value in values]


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_a_text_that_is_cut_anywhere_is_refused(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_lists, "PIECE", piece)
    text = '{"a": [1, {"b": "c"}, -2.5e3], "x": {"y": [null]}, "z": []}'
    assert read(text, "a") == [("a", 1), ("a", {"b": "c"}), ("a", -2500.0)]
    for end in range(len(text)):
        with pytest.raises(ParseError):
            read(text[:end], "a")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": [1,]}', "no JSON"),
        ('{"a": [1 2]}', "a comma or ] is wanted at character 9"),
        ('{"a": [1], }', "a name is wanted"),
        ('{"a" [1]}', "a colon is wanted"),
        ("{'a': [1]}", "a name is wanted"),
        ('{"a": [1], "a": [2]}', "names 'a' twice"),
        ('{"a": 5}', "its 'a' is no list"),
        ('{"a": [NaN]}', "NaN"),
        ('{"a": [-Infinity]}', "-Infinity"),
        ('{"a": [{"b": 1, "b": 2}]}', "names 'b' twice in one object"),
        ('{"a": [' + "9" * 5000 + "]}", "a number that cannot be read"),
        ('{"a": [' + "[" * 100_000, "nests too deeply"),
        ("[1]", "no JSON object"),
        ("", "no JSON object"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ParseError) as caught:
        read(text, "a")
    assert words in str(caught.value)


def test_an_element_without_an_end_is_refused_before_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "LONGEST", 10_000)
    monkeypatch.setattr(json_lists, "PIECE", 1000)
    source = io.StringIO('{"a": ["' + "x" * 1_000_000)
    with pytest.raises(ParseError, match="it is cut, or no JSON"):
        list(JsonLists(source, ("a",)).items())
    assert source.tell() < 50_000


def test_memory_is_that_of_a_piece_and_not_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "PIECE", 4096)
    element = json.dumps({"id": 1, "segmentation": [[1.5] * 100]})
    text = '{"a": [' + ",".join([element] * 2000) + "]}"
    source = io.StringIO(text)
    tracemalloc.start()
    count = sum(1 for _ in JsonLists(source, ("a",)).items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert len(text) > 1e6
    assert peak < 1e5
