"""convert from=openimages: what encode caches is what the csv says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made.annotated import boxes_of, cached, converted, picture, refusal, summary, write, write_pictures
from pipeline.config.conditions import BoxesConfig

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
ROWS = """b,x,/m/dog,1,0.25,0.75,0.5,1.0005,0,0,0
a,x,/m/cat,1,0.25,0.75,0,1,0,0,0
a,x,/m/dog,1,0,1,0.5,1,0,0,1
"""
NAMES = 'LabelName,DisplayName\n/m/cat,Cat\n/m/dog,"Dog, a"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", {"train_0/b.jpg": (64, 64), "a.jpg": (32, 32), "bare.jpg": (32, 32)})
    return write(tmp_path, {"boxes.csv": f"{HEADER}{ROWS}".encode(), "names.csv": NAMES.encode()})


def given(folder: Path, *files: str) -> dict[str, Any]:
    return {
        "annotations": tuple(str(folder / name) for name in files or ("boxes.csv",)),
        "names": str(folder / "names.csv"),
    }


@pytest.mark.parametrize("names", [NAMES, NAMES.partition("\n")[2]])
def test_boxes_and_names_arrive_in_the_cache(folder: Path, names: str) -> None:
    write(folder, {"names.csv": names.encode()})
    out = converted(folder, "openimages", **given(folder))
    assert (out / "boxes.txt").read_text() == "Cat\nDog, a\nCat (group)\nDog, a (group)\n"
    found = BoxesConfig(names=str(out / "boxes.txt"), most=4)
    _, records = cached(out, folder / "cache", conditions=("boxes",), boxes=found)
    assert {key: boxes_of(record) for key, record in records.items()} == {
        "a": [[0, 0.25, 0, 0.75, 1], [3, 0, 0.5, 1, 1]],
        "train_0/b": [[1, 0.25, 0.5, 0.75, 1]],
    }
    assert summary(out)["passed_over"] == 1  # bare.jpg has no row


def test_what_cannot_be_used_is_counted_by_its_reason(folder: Path) -> None:
    bad = [
        *("a,x,/m/cow,1,0,1,0,1,0,0,0", "a,x,/m/cat,1,0,1,0,1,0,0", "a,x,/m/cat,1,0,1,0,1,0,0,2"),
        *("a,x,/m/cat,1,0,nan,0,1,0,0,0", "a,x,/m/cat,1,0,1_0,0,1,0,0,0", "a,x,/m/cat,1,0,,0,1,0,0,0"),
        *("a,x,/m/cat,1,1,0,0,1,0,0,0", "a,x,/m/cat,1,0,1.01,0,1,0,0,0", "a/../b,x,/m/cat,1,0,1,0,1,0,0,0"),
        *("gone,x,/m/cat,1,0,1,0,1,0,0,0", "two,x,/m/cat,1,0,1,0,1,0,0,0"),
    ]
    write(folder, {"boxes.csv": f"{HEADER}{ROWS}\n".encode() + "\r\n".join(bad).encode()})
    write(folder / "images", {"x/two.jpg": picture((8, 8), "x.jpg"), "y/two.jpg": picture((8, 8), "x.jpg")})
    out = converted(folder, "openimages", max_rejects=1.0, **given(folder))
    assert summary(out)["annotations"] == {
        "read": 14,
        "rejected": {"box_empty": 1, "box_outside": 1, "box_unreadable": 3, "category_unknown": 1, "row_unreadable": 3},
    }
    assert summary(out)["rejected"] == {"image_missing": 1, "image_repeated": 1}
    assert (summary(out)["images"], summary(out)["boxes"]) == (2, 3)
    listed = [json.loads(line) for line in (out / "convert/annotations.jsonl").read_text().splitlines()]
    assert {"key": "a", "message": "/m/cow has no name", "reason": "category_unknown"} in listed


def test_an_image_that_exif_turns_is_left_out(folder: Path) -> None:
    """Its size does not tell whether its boxes were drawn before or after it was turned."""
    write(folder / "images", {"a.jpg": picture((32, 16), "a.jpg", 0, 6)})
    out = converted(folder, "openimages", max_rejects=1.0, **given(folder))
    assert summary(out)["rejected"] == {"image_turned": 1}


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("boxes.csv", b"", "names no column ImageID, LabelName, XMin"),
        ("boxes.csv", HEADER.replace("XMin", "xmin").encode(), "names no column XMin"),
        ("boxes.csv", f'{HEADER}a,"x'.encode(), "line 2 is no csv"),
        ("boxes.csv", f"{HEADER}a,{'x' * 200_000}".encode(), "line 2 is no csv (field larger"),
        ("boxes.csv", HEADER.encode() + b"\xff", "not UTF-8"),
        ("names.csv", b"", "it holds no names"),
        ("names.csv", b"/m/cat,Cat\n/m/cat,Dog\n", "it names /m/cat twice"),
        ("names.csv", b"Cat\n", "a label and its name are wanted"),
        ("names.csv", b"\xff,a", "not UTF-8"),
    ],
)
def test_a_file_that_is_none_of_theirs_is_refused_and_named(folder: Path, file: str, data: bytes, words: str) -> None:
    write(folder, {file: data})
    told = refusal(folder, "openimages", **given(folder))
    assert words in told
    assert file in told


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    assert "gone.csv: it cannot be found" in refusal(folder, "openimages", **given(folder, "gone.csv"))
    told = refusal(folder, "openimages", **{**given(folder), "names": str(folder / "gone.csv")})
    assert "gone.csv: there is no such file" in told
