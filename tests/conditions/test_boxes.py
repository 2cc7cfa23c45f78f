"""Boxes of a crop: clipped by it, the largest kept, and what is no box refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.conditions.boxes import WHOLE, boxes_of_file, crop_boxes, flip_boxes, read_boxes
from pipeline.conditions.facts import BoxFacts
from pipeline.errors import ConfigError, RecordRejected

FACTS = BoxFacts(count=10, most=4)


@dataclass(frozen=True)
class Place:
    resized: tuple[int, int]
    box: tuple[int, int, int, int]


def array(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


@st.composite
def places(draw: st.DrawFn) -> Place:
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    left, top = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    right, below = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    return Place((left + width + right, top + height + below), (left, top, width, height))


@st.composite
def entries(draw: st.DrawFn) -> list[list[float]]:
    rows = []
    for _ in range(draw(st.integers(0, 8))):
        (x0, x1), (y0, y1) = (sorted(draw(st.integers(0, 32)) / 32 for _ in range(2)) for _ in range(2))
        rows.append([draw(st.integers(0, 9)), x0, y0, x1, y1])
    return rows


def slowly(rows: list[list[float]], place: Place, facts: BoxFacts) -> tuple[list[list[float]], int]:
    """The same, one edge after the other."""
    (wide, high), (left, top, width, height) = place.resized, place.box
    seen = []
    for number, (cls, *edges) in enumerate(rows):
        x0, x1 = ((edge * wide - left) / width for edge in edges[::2])
        y0, y1 = ((edge * high - top) / height for edge in edges[1::2])
        if x0 < 1 and y0 < 1 and x1 > 0 and y1 > 0:
            x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in (x0, y0, x1, y1))
            seen.append((-(x1 - x0) * (y1 - y0), number, [cls, x0, y0, x1, y1]))
    large = [one for one in seen if -one[0] > 0 and -one[0] >= facts.min_area]
    kept = [row for _, row in sorted(one[1:] for one in sorted(large)[: facts.most])]
    return kept, len(seen) - len(kept)


@given(entries(), places(), st.sampled_from([0.0, 0.1]))
def test_boxes_of_a_crop_agree_with_a_slow_formula(rows: list[list[float]], place: Place, smallest: float) -> None:
    facts = BoxFacts(count=10, most=4, min_area=smallest)
    stored, cut = crop_boxes(read_boxes(rows), place, facts)
    wanted, cut_slowly = slowly(rows, place, facts)
    assert stored.dtype == np.float16
    assert stored.tolist() == np.array(wanted + [[-1] * 5] * (4 - len(wanted)), dtype=np.float16).tolist()
    assert cut == cut_slowly


def test_a_box_that_the_crop_cuts_loses_what_was_cut() -> None:
    """x0 clamped and the width left as it was would stretch the box to the right (a bug of others)."""
    stored, cut = crop_boxes(array((3, 0.0, 0.0, 0.5, 1.0)), Place((8, 4), (2, 0, 4, 4)), FACTS)
    assert stored[0].tolist() == [3, 0, 0, 0.5, 1]
    assert cut == 0
    assert (stored[1:] == -1).all()


def test_the_largest_are_kept_in_the_order_of_the_source_and_the_others_counted() -> None:
    rows = [(number, 0.0, 0.0, side, side) for number, side in enumerate((0.5, 0.1, 0.9, 0.2, 0.8, 0.9))]
    stored, cut = crop_boxes(array(*rows), WHOLE, FACTS)
    assert stored[:, 0].tolist() == [0, 2, 4, 5]
    assert cut == 2


def test_of_equal_areas_the_first_are_kept() -> None:
    stored, cut = crop_boxes(array(*[(number, 0, 0, 1, 1) for number in range(6)]), WHOLE, FACTS)
    assert stored[:, 0].tolist() == [0, 1, 2, 3]
    assert cut == 2


def test_small_boxes_are_counted_and_boxes_outside_of_the_crop_are_not() -> None:
    place = Place((100, 100), (0, 0, 50, 50))
    rows = array((1, 0.5, 0, 1, 1), (2, 0, 0, 0.5, 0.5), (3, 0.1, 0.1, 0.1, 0.4), (4, 0.2, 0.2, 0.2001, 0.2001))
    stored, cut = crop_boxes(rows, place, BoxFacts(count=10, most=4, min_area=0.001))
    assert stored[stored[:, 0] >= 0, 0].tolist() == [2]
    assert cut == 2


def test_a_box_without_area_in_float16_is_left_out() -> None:
    stored, cut = crop_boxes(array((1, 0.9, 0, 0.90001, 1)), WHOLE, FACTS)
    assert (stored == -1).all()
    assert cut == 1


def test_a_class_beyond_the_count_is_refused_wherever_its_box_lies() -> None:
    with pytest.raises(RecordRejected, match="box_class_out_of_range: 10, the classes are 0 to 9"):
        crop_boxes(array((10, 0.9, 0.9, 1, 1)), Place((10, 10), (0, 0, 1, 1)), FACTS)


@given(entries(), places())
def test_flipping_commutes_with_cropping(rows: list[list[float]], place: Place) -> None:
    (wide, high), (left, top, width, height) = place.resized, place.box
    mirrored = [[cls, 1 - x1, y0, 1 - x0, y1] for cls, x0, y0, x1, y1 in rows]
    there = Place((wide, high), (wide - left - width, top, width, height))
    facts = BoxFacts(count=10, most=8)
    flipped = flip_boxes(crop_boxes(read_boxes(rows), place, facts)[0])
    other = crop_boxes(read_boxes(mirrored), there, facts)[0]
    assert np.abs(flipped.astype(float) - other).max() <= 2**-10, "float16 rounds 1 - x"
    assert np.abs(flip_boxes(flipped).astype(float) - flip_boxes(other)).max() <= 2**-9


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "boxes_missing"),
        ("[]", "boxes_unreadable"),
        ({}, "boxes_unreadable"),
        (3, "boxes_unreadable"),
        ([[]], "boxes_unreadable"),
        ([[1, 0, 0, 1]], "boxes_unreadable"),
        ([[1, 0, 0, 1, 1, 1]], "boxes_unreadable"),
        ([1, 0, 0, 1, 1], "boxes_unreadable"),
        ([[[1], 0, 0, 1, 1]], "boxes_unreadable"),
        ([[[[[[1]]]], 0, 0, 1, 1]], "boxes_unreadable"),
        ([[True, 0, 0, 1, 1]], "boxes_unreadable"),
        ([[1, 0, 0, 1, None]], "boxes_unreadable"),
        ([[1, 0, 0, "1", 1]], "boxes_unreadable"),
        ([["cat", 0, 0, 1, 1]], "boxes_unreadable"),
        ([[1.5, 0, 0, 1, 1]], "boxes_unreadable"),
        ([[-1, 0, 0, 1, 1]], "boxes_unreadable"),
        ([[2049, 0, 0, 1, 1]], "boxes_unreadable"),
        ([[1e308, 0, 0, 1, 1]], "boxes_unreadable"),
        ([[10**400, 0, 0, 1, 1]], "boxes_unreadable"),
        ([[1, 0, 0, 10**400, 1]], "boxes_unreadable"),
        ([[1, float("nan"), 0, 1, 1]], "boxes_unreadable"),
        ([[1, 0, 0, float("inf"), 1]], "boxes_unreadable"),
        ([[1, 0.6, 0, 0.5, 1]], "boxes_inverted"),
        ([[1, 0, 1, 1, 0]], "boxes_inverted"),
        ([[1, 0, 0, 1e308, 1]], "boxes_outside"),
        ([[1, -0.01, 0, 1, 1]], "boxes_outside"),
        ([[1, 0, 0, 1, 1.01]], "boxes_outside"),
        ([[1, 20, 30, 120, 140]], "boxes_outside"),
    ],
)
def test_what_is_no_box_is_a_counted_reason(value: Any, why: str) -> None:
    with pytest.raises(RecordRejected) as rejection:
        read_boxes(value)
    assert rejection.value.reason == why
    assert "\n" not in str(rejection.value)
    assert len(str(rejection.value)) < 300


def test_edges_that_lie_outside_by_rounding_are_clipped() -> None:
    boxes = read_boxes([[0, -1e-9, -1e-7, 1 + 1e-7, 1.0000001]])
    assert boxes.tolist() == [[0, 0, 0, 1, 1]]
    assert read_boxes([]).shape == (0, 5)
    assert crop_boxes(read_boxes([]), WHOLE, FACTS)[1] == 0


# --------------------------------------------------------------------------------------------------------------------
# Sampling

NAMED = BoxFacts(count=3, most=2, min_area=0.01, names=("cat", "dog", "red circle"))


def test_a_file_of_boxes_holds_numbers_or_names() -> None:
    rows = [["dog", 0, 0, 0.5, 1], [2, 0.5, 0, 1, 0.25]]
    for value in (rows, {"boxes": rows, "caption": "a dog"}):
        stored = boxes_of_file(json.dumps(value).encode(), NAMED)
        assert stored.dtype == np.float16
        assert stored.tolist() == [[1, 0, 0, 0.5, 1], [2, 0.5, 0, 1, 0.25]]
    assert (boxes_of_file(b"[]", NAMED) == -1).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is not JSON"),
        (b"3", "it holds no list of boxes"),
        (b'{"box": []}', "it holds no list of boxes"),
        (b'[["dgo", 0, 0, 1, 1]]', "did you mean dog"),
        (b"[[3, 0, 0, 1, 1]]", "box_class_out_of_range: 3, the classes are 0 to 2"),
        (b"[[1, 0.5, 0, 0, 1]]", "boxes_inverted"),
        (b"[[1, 0, 0, 10, 10]]", "edges are fractions of the image"),
        (b"[[1, 0, 0, NaN, 1]]", "it holds NaN|it is not JSON"),
        (b"[[1, 0, 0, 1e308, 1]]", "boxes_outside"),
        (b"[[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]", "it has 3 boxes, the model was given at most 2"),
        (b"[[0, 0, 0, 0.05, 0.05]]", "smaller than what the model was trained with"),
        (b"[" * 5000, "it nests deeper"),
        (b"\xff\xfe", "it is not UTF-8"),
        (b" " * (1 << 21), "bytes"),
    ],
)
def test_a_file_that_holds_no_boxes_is_refused_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        boxes_of_file(data, NAMED, "mine.json")
    assert str(error.value).startswith("mine.json: ")
    assert "\n" not in str(error.value)
