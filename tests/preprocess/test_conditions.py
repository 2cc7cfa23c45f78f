"""preprocess/source/conditions.py: what stands beside an image is read strictly, cropped and flipped like it, and what
cannot be right is a reason that is counted."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from made.encode import config, png
from made.hostile import png_rows, raw_png
from pipeline.conditions.facts import Conditions
from pipeline.conditions.lowres import bicubic
from pipeline.conditions.mask import masks, unpack
from pipeline.config.conditions import BoxesConfig, ClassesConfig, LabelsConfig, LowresConfig, MaskConfig
from pipeline.errors import RecordRejected
from preprocess.source.conditions import stored_arrays
from preprocess.source.recipe import recipe_of
from preprocess.source.sample import Picture, Prepared, prepare
from preprocess.source.shard import SUFFIXES, Sample, split_name

GROUPS: dict[str, dict[str, Any]] = {
    "class": {"classes": ClassesConfig(count=24)},
    "boxes": {"boxes": BoxesConfig(count=25, most=4)},
    "labels": {"labels": LabelsConfig(count=25)},
    "lowres": {},
    "mask": {},
    "pixels": {},
}


def encoded(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG", **options)
    return out.getvalue()


def sample(size: tuple[int, int] = (64, 64), **members: bytes) -> Sample:
    """A sample of noise of a size (width, height). members: by suffix, with _ for the dot."""
    named = {name.replace("_png", ".png"): data for name, data in members.items()}
    return Sample("k", {"png": png(size), **named})


def prepared(one: Sample, *conditions: str, **changes: Any) -> Prepared:
    groups = {name: value for condition in conditions for name, value in GROUPS[condition].items()}
    settings = config("", "", text_storage="none", conditions=conditions, **{**groups, **changes})
    return prepare(one, recipe_of(settings), None)


def reason(one: Sample, *conditions: str, **changes: Any) -> str:
    """The reason of its rejection; "" for a sample that is taken."""
    try:
        prepared(one, *conditions, **changes)
    except RecordRejected as rejection:
        return rejection.reason
    return ""


def column(**columns: Any) -> bytes:
    return json.dumps(columns).encode()


# --------------------------------------------------------------------------------------------------------------------
# Files of a sample


def test_files_of_a_sample_are_told_apart_by_their_longest_suffix() -> None:
    found = {name: split_name(f"a/b.{name}") for name in SUFFIXES}
    assert found == {name: ("a/b", name) for name in SUFFIXES}
    assert {"labels.png", "lr.png", "mask.png", "cls", "png"} <= set(SUFFIXES)
    assert split_name("a/mask.png") == ("a/mask", "png")


def test_a_mask_without_an_image_is_counted_as_that() -> None:
    alone = Sample("k", {"mask.png": encoded(np.zeros((64, 64), np.uint8))})
    assert reason(alone, "mask", mask=MaskConfig(kinds=("file",))) == "image_missing"


def test_a_sample_needs_no_caption_where_none_is_stored() -> None:
    found = prepared(sample(txt=b"\xff"))
    assert (found.caption, found.ids, found.tokens) == ("", [], 0)


# --------------------------------------------------------------------------------------------------------------------
# Class


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"cls": b"23"}, ""),
        ({"cls": b"7\n"}, ""),
        ({}, "class_missing"),
        ({"cls": b"24"}, "class_out_of_range"),
        ({"cls": b"-1"}, "class_out_of_range"),
        ({"cls": b"1.5"}, "class_unreadable"),
        ({"cls": b""}, "class_unreadable"),
    ],
)
def test_a_class_is_a_number_of_the_cls_member(members: dict[str, bytes], expected: str) -> None:
    assert reason(Sample("k", {"png": png(), **members}), "class") == expected


def test_a_class_is_a_number_or_a_name_of_a_column(tmp_path: Any) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    classes = ClassesConfig(key="json:kind", names=str(tmp_path / "names.txt"))

    def read(value: Any) -> Any:
        return prepared(sample(json=column(kind=value)), "class", classes=classes).pictures[0].conditions["class"]

    assert [read(value) for value in ("dog", 1, 0)] == [1, 1, 0]
    assert read("dog").dtype == np.int32 and read("dog").shape == ()
    assert reason(sample(json=column(kind="owl")), "class", classes=classes) == "class_unreadable"
    assert reason(sample(json=column(kind=2)), "class", classes=classes) == "class_out_of_range"
    assert reason(sample(json=column(other=1)), "class", classes=classes) == "class_missing"
    assert reason(sample(json=b"["), "class", classes=classes) == "json_unreadable"


# --------------------------------------------------------------------------------------------------------------------
# Boxes


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([[24, 0, 0, 1, 1]], ""),
        ([], ""),
        (None, "boxes_missing"),
        ([[25, 0, 0, 1, 1]], "box_class_out_of_range"),
        ([[1, 0.5, 0, 0.4, 1]], "boxes_inverted"),
        ([[1, 0, 0, 1.2, 1]], "boxes_outside"),
        ([[1, 0, 0, 1]], "boxes_unreadable"),
    ],
)
def test_boxes_that_cannot_be_right_are_counted_by_their_reason(boxes: Any, expected: str) -> None:
    assert reason(sample(json=column(**({} if boxes is None else {"boxes": boxes}))), "boxes") == expected


def test_boxes_move_with_the_crop_and_are_clipped_by_it() -> None:
    """The picture is 128 x 64, the crop its middle 64: the left quarter and the right quarter are gone."""
    boxes = [[3, 0.25, 0.0, 0.5, 1.0], [4, 0.0, 0.0, 0.2, 0.5], [5, 0.5, 0.5, 1.0, 1.0]]
    picture = prepared(sample((128, 64), json=column(boxes=boxes)), "boxes").pictures[0]
    found = picture.conditions["boxes"]
    assert found.shape == (4, 5) and found.dtype == np.float16
    assert found.tolist() == [[3, 0, 0, 0.5, 1], [5, 0.5, 0.5, 1, 1], *[[-1] * 5] * 2]
    assert picture.cut_boxes == 0  # what lies outside the crop is not in the picture


def test_too_many_boxes_are_cut_by_area_and_counted_and_the_sample_is_taken() -> None:
    boxes = [[number, 0, 0, (number % 7 + 1) / 8, 0.5] for number in range(7)]
    picture = prepared(sample(json=column(boxes=boxes)), "boxes").pictures[0]
    assert picture.conditions["boxes"][:, 0].tolist() == [3, 4, 5, 6]
    assert picture.cut_boxes == 3


# --------------------------------------------------------------------------------------------------------------------
# Label maps


def labelled(labels: np.ndarray, **options: Any) -> Sample:
    return sample(labels.shape[::-1], labels_png=encoded(labels, **options))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.full((64, 64), 24, np.uint8), ""),
        (np.full((64, 64), 25, np.uint8), "label_out_of_range"),
        (np.full((64, 64), 255, np.uint8), "label_out_of_range"),
        (np.ones((64, 64), np.uint16), "labels_unreadable"),
        (np.ones((64, 64, 3), np.uint8), "labels_unreadable"),
        (np.ones((64, 64, 4), np.uint8), "labels_unreadable"),
        (np.ones((64, 63), np.uint8), "labels_size"),
        (np.ones((32, 32), np.uint8), "labels_size"),
    ],
)
def test_label_maps_that_cannot_be_right_are_counted_by_their_reason(labels: np.ndarray, expected: str) -> None:
    assert reason(sample(labels_png=encoded(labels)), "labels") == expected


def test_a_label_map_that_is_missing_or_damaged_is_counted() -> None:
    assert reason(sample(), "labels") == "labels_missing"
    assert reason(sample(labels_png=b"x"), "labels") == "labels_unreadable"
    whole = encoded(np.random.default_rng(0).integers(0, 25, (64, 64), dtype=np.uint8))
    assert reason(sample(labels_png=whole), "labels") == ""
    assert reason(sample(labels_png=whole[:-200]), "labels") == "labels_unreadable"


def test_255_becomes_0_with_an_offset_of_1() -> None:
    labels = np.full((64, 64), 255, np.uint8)
    labels[:, 32:] = 182
    found = prepared(labelled(labels), "labels", labels=LabelsConfig(count=184, offset=1)).pictures[0]
    assert found.conditions["labels"][0, [0, 63]].tolist() == [0, 183]
    assert reason(labelled(labels), "labels", labels=LabelsConfig(count=183, offset=1)) == "label_out_of_range"


def test_labels_of_4_bits_and_of_palettes_are_the_numbers_of_the_file() -> None:
    labels = (np.arange(64 * 64).reshape(64, 64) % 16).astype(np.uint8)
    palette = Image.fromarray(labels, "P")
    palette.putpalette(bytes(range(256)) * 3)
    out = io.BytesIO()
    palette.save(out, "PNG", bits=4)
    found = prepared(sample(labels_png=out.getvalue()), "labels").pictures[0].conditions["labels"]
    assert (found == labels).all()
    grey = raw_png((64, 64), png_rows((64, 64), 4, 0), 4, 0)  # Pillow writes none of 4 bits
    stretched = np.asarray(Image.open(io.BytesIO(grey)))
    found = prepared(sample(labels_png=grey), "labels").pictures[0].conditions["labels"]
    assert (found.astype(int) * 17 == stretched).all() and found.max() < 16 < stretched.max()


def test_label_maps_are_cropped_like_the_image_without_mixing_labels() -> None:
    labels = np.zeros((128, 256), dtype=np.uint8)
    labels[:, 128:] = 7
    found = prepared(labelled(labels), "labels").pictures[0].conditions["labels"]
    assert found.shape == (64, 64)
    assert (found[:, :32] == 0).all() and (found[:, 32:] == 7).all()


# --------------------------------------------------------------------------------------------------------------------
# Small images and masks


def test_the_small_image_is_of_8_bits_and_of_the_crop() -> None:
    picture = prepared(sample((100, 64)), "lowres").pictures[0]
    small = picture.conditions["lowres"]
    assert (small.shape, small.dtype) == ((3, 16, 16), np.uint8)
    assert (small == bicubic(np.ascontiguousarray(picture.pixels), 4).transpose(2, 0, 1)).all()


def test_variants_of_a_degradation_differ_and_are_the_same_again() -> None:
    bsr = LowresConfig(degradation="bsr", variants=3)
    first, again = (prepared(sample(), "lowres", lowres=bsr).pictures[0].conditions["lowres"] for _ in range(2))
    assert first.shape == (3, 3, 16, 16)
    assert (first == again).all()
    assert len({variant.tobytes() for variant in first}) == 3


def test_a_small_image_of_the_source_is_cropped_like_the_large_one() -> None:
    small = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    own = LowresConfig(degradation="file")
    one = sample((128, 64), lr_png=encoded(small))
    found = prepared(one, "lowres", lowres=own).pictures[0].conditions["lowres"]
    assert (found == small[:, 8:24].transpose(2, 0, 1)).all()
    assert reason(sample((128, 64)), "lowres", lowres=own) == "lowres_missing"
    assert reason(sample((64, 64), lr_png=encoded(small)), "lowres", lowres=own) == "lowres_size"
    assert reason(sample((128, 64), lr_png=b"x"), "lowres", lowres=own) == "lowres_unreadable"


def test_a_mask_of_the_source_is_white_in_the_hole_and_cropped_like_the_image() -> None:
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 64:] = 255
    own = MaskConfig(kinds=("file",))
    picture = prepared(sample((128, 64), mask_png=encoded(mask)), "mask", mask=own).pictures[0]
    assert picture.conditions["mask"].tolist() == (mask[:, 32:96] // 255).tolist()
    assert reason(sample(), "mask", mask=own) == "mask_missing"
    assert reason(sample(mask_png=encoded(mask)), "mask", mask=own) == "mask_size"
    assert reason(sample((128, 64), mask_png=b"x"), "mask", mask=own) == "mask_unreadable"
    deep = encoded(np.ones((64, 64), np.uint16))
    assert reason(sample(mask_png=deep), "mask", mask=own) == "mask_unreadable"


# --------------------------------------------------------------------------------------------------------------------
# Flips, and what is stored


def everything() -> tuple[Picture, Conditions]:
    """A picture with every condition, and their facts."""
    labels = Image.new("L", (64, 64))
    ImageDraw.Draw(labels).polygon([(2, 3), (30, 9), (11, 60)], fill=9)
    one = sample(
        labels_png=encoded(np.asarray(labels)),
        json=column(boxes=[[3, 0.25, 0.0, 0.5, 1.0]]),
        cls=b"5",
        mask_png=encoded(np.asarray(labels) * 28),
    )
    changes: dict[str, Any] = {
        "lowres": LowresConfig(degradation="bsr", variants=2),
        "mask": MaskConfig(kinds=("thin", "file"), variants=4),
    }
    groups = {name: value for group in GROUPS.values() for name, value in group.items()}
    settings = config("", "", text_storage="none", conditions=tuple(GROUPS), **{**groups, **changes})
    recipe = recipe_of(settings)
    return prepare(one, recipe, None).pictures[0], recipe.conditions


def test_a_flipped_picture_has_flipped_conditions() -> None:
    picture, _ = everything()
    flipped = picture.flipped()
    assert (flipped.pixels == picture.pixels[:, ::-1]).all()
    for name in ("labels", "lowres", "mask"):
        assert (flipped.conditions[name] == picture.conditions[name][..., ::-1]).all(), name
        assert not (flipped.conditions[name] == picture.conditions[name]).all(), name
    assert flipped.conditions["boxes"][0].tolist() == [3, 0.5, 0, 0.75, 1]
    assert (flipped.conditions["boxes"][1:] == -1).all()
    assert flipped.conditions["class"] == 5
    again = flipped.flipped()
    assert all((again.conditions[name] == array).all() for name, array in picture.conditions.items())


def test_the_arrays_of_a_record_are_what_the_facts_say() -> None:
    picture, facts = everything()
    arrays, drawn = stored_arrays(picture.conditions, picture.pixels, "000000_000001", facts, 8)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "cond.class": ("int32", ()),
        "cond.boxes": ("float16", (4, 5)),
        "cond.labels": ("uint8", (32, 32)),
        "cond.lowres": ("uint8", (2, 3, 16, 16)),
        "cond.mask": ("uint8", (4, 64, 8)),
        "pixels": ("uint8", (3, 64, 64)),
    }
    assert facts.mask is not None and drawn is not None
    assert (drawn == masks("000000_000001", (64, 64), facts.mask, picture.conditions["mask"])).all()
    assert (unpack(arrays["cond.mask"], 64) == drawn).all()
    assert any((mask == picture.conditions["mask"]).all() for mask in drawn)
    assert (arrays["cond.labels"] == picture.conditions["labels"][1::2, 1::2]).all()
    assert (arrays["pixels"].transpose(1, 2, 0) == picture.pixels).all()
    other, _ = stored_arrays(picture.conditions, picture.pixels, "000000_000002", facts, 8)
    assert {name for name in arrays if (arrays[name] != other[name]).any()} == {"cond.mask"}


def test_the_rectangle_of_a_record_is_that_of_caches_before() -> None:
    """The value was computed by `hole` of the version before variants."""
    picture, facts = everything()
    assert facts.mask is not None
    old = replace(facts, mask=replace(facts.mask, kinds=("rectangles",), variants=1, packed=False))
    mask = stored_arrays(picture.conditions, picture.pixels, "000001_000002", old, 8)[0]["cond.mask"]
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    assert [int(n) for n in (columns[0], columns[-1], rows[0], rows[-1])] == RECTANGLE
    assert mask.sum() == len(rows) * len(columns)


RECTANGLE = [40, 56, 34, 52]
"""First and last column, first and last row of the hole."""
