"""convert from=coco: what encode caches is what the files say, and what cannot be used is counted or refused."""

from __future__ import annotations

import json
import shlex
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made.annotated import (
    box,
    boxes_of,
    cached,
    coco,
    converted,
    greys,
    images_of,
    picture,
    refusal,
    said,
    summary,
    write,
    write_pictures,
)
from pipeline.config import ConvertConfig, LimitsConfig
from pipeline.config.conditions import BoxesConfig, LabelsConfig
from pipeline.config.loading.load import load
from preprocess.converting import json_lists, streams
from preprocess.converting.coco import Coco
from preprocess.converting.streams import opened

THINGS = [
    box(7, 90, [16, 0, 32.5, 32]),
    box(8, 1, [8, 16, 16, 32]),
    box(7, 1, [0, 0, 64.01, 16]),
    box(9, 1, [12, 12, 24, 12], iscrowd=1),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images")
    write(tmp_path, {"things.json": coco(THINGS)})
    return tmp_path


def given(folder: Path, *names: str) -> dict[str, Any]:
    return {"annotations": tuple(str(folder / name) for name in names or ("things.json",))}


def test_boxes_and_names_arrive_in_the_cache(folder: Path) -> None:
    """Centre crops of 32: of a.jpg columns 16 to 48, of b.jpg rows 16 to 48; c.png is 48 wide and made smaller."""
    out = converted(folder, "coco", **given(folder))
    names = ("person", "toothbrush", "banner", "person (group)", "toothbrush (group)", "banner (group)")
    assert (out / "boxes.txt").read_text().splitlines() == list(names)
    found = BoxesConfig(names=str(out / "boxes.txt"), most=4)
    manifest, records = cached(out, folder / "cache", conditions=("boxes",), boxes=found)
    assert manifest.contract.conditions.boxes is not None and manifest.contract.conditions.boxes.names == names
    assert {key: boxes_of(record) for key, record in records.items()} == {
        "a": [[1, 0, 0, 1, 1], [0, 0, 0, 1, 0.5]],
        "b": [[0, 0.25, 0, 0.75, 1]],
        "c": [[3, 0.25, 0.25, 0.75, 0.5]],
    }


@pytest.mark.parametrize(("crowds", "names", "c"), [("same", 3, [[0]]), ("leave_out", 3, [])])
def test_crowds_are_counted_or_are_of_the_class_of_their_objects(
    folder: Path, crowds: str, names: int, c: list[list[float]]
) -> None:
    out = converted(folder, "coco", crowds=crowds, **given(folder))
    assert len((out / "boxes.txt").read_text().splitlines()) == names
    _, records = cached(out, folder / "cache", conditions=("boxes",), boxes=BoxesConfig(count=names))
    assert [one[:1] for one in boxes_of(records["c"])] == c
    left = {"filter:crowds": 1} if crowds == "leave_out" else {}
    assert summary(out)["annotations"] == {"read": 4, "rejected": left}


def test_instances_stuff_and_captions_of_the_same_images_are_joined(folder: Path) -> None:
    stuff = [{"id": 183, "name": "other"}, {"id": 95, "name": "sky"}]
    told = [said(7, " two  words\n"), said(9, "über"), said(8, "b"), said(7, "second")]
    files = {
        "stuff.json": coco([box(7, 95, [0, 16, 64, 16]), box(8, 183, [0, 0, 1, 1])], categories=stuff),
        "captions.json": coco(told, categories=None),
    }
    write(folder, files)
    out = converted(folder, "coco", leave_out=("other",), **given(folder, "things.json", "stuff.json", "captions.json"))
    assert (out / "boxes.txt").read_text().splitlines()[:4] == ["person", "toothbrush", "banner", "sky"]
    names = BoxesConfig(names=str(out / "boxes.txt"))
    _, records = cached(out, folder / "cache", conditions=("boxes",), boxes=names, text_storage="tokens")
    captions = {key: record.meta["caption"] for key, record in records.items()}
    assert captions == {"a": "two  words", "b": "b", "c": "über"}
    assert boxes_of(records["a"])[2] == [3, 0, 0.5, 1, 1]
    assert len(boxes_of(records["b"])) == 1
    assert members(out)["a.json"]["captions"] == ["two  words", "second"]
    assert summary(out)["captions"] == 4
    assert summary(out)["annotations"]["rejected"] == {"filter:leave_out": 1}


def members(out: Path) -> dict[str, Any]:
    """The json files of the first tar."""
    with tarfile.open(out / "00000.tar") as tar:
        return {one.name: json.load(tar.extractfile(one)) for one in tar if one.name.endswith(".json")}  # type: ignore[arg-type]


def test_label_maps_of_categories_are_numbered_without_holes(folder: Path) -> None:
    """As stuffthingmaps are: values are one less than the categories' numbers, 255 is unlabelled."""
    maps = {}
    for name, (width, height) in {"a": (64, 32), "b": (32, 64), "c": (48, 48)}.items():
        values = np.full((height, width), 255, dtype=np.uint8)
        values[: height // 2, : width // 2], values[height // 2 :, width // 2 :] = 89, 91
        maps[f"{name}.png"] = greys(values)
    write(folder / "maps", maps)
    out = converted(folder, "coco", labels=str(folder / "maps"), label_offset=1, **given(folder))
    assert (out / "labels.txt").read_text().split() == ["unlabelled", "person", "toothbrush", "banner"]
    found = LabelsConfig(names=str(out / "labels.txt"), grid=8)
    _, records = cached(out, folder / "cache", conditions=("labels",), labels=found)
    labels = records["b"].members["cond.labels"]
    expected = np.zeros((32, 32), dtype=np.uint8)
    expected[:16, :16], expected[16:, 16:] = 2, 3
    assert (labels == expected).all()
    told = refusal(folder, "coco", labels=str(folder / "maps"), dest=str(folder / "wrong"), **given(folder))
    assert "3 label_unknown" in told
    assert "a pixel is 89, which has no name" in told


def test_annotations_that_cannot_be_used_are_counted_by_their_reasons(folder: Path) -> None:
    bad = [
        *(box(7, 90, bbox) for bbox in ([0, 0, 0, 5], [0, 0, 5, -5], [63.5, 0, 0, 3], [64.5, 0, 0.4, 3])),
        *(box(7, 90, bbox) for bbox in ([0, 0, 66, 5], [-1.5, 0, 5, 5], [1e999, 0, 1, 1])),
        *(box(7, 90, bbox) for bbox in ([0, 0, 5], "0,0,5,5", None, [0, 0, "5", 5], [0, 0, True, 5])),
        *(box(7, 4, [0, 0, 5, 5]), box(70, 90, [0, 0, 5, 5])),
        *(box("7", 90, [0, 0, 5, 5]), box(7, None, [0, 0, 5, 5]), box(7, 90, [0, 0, 5, 5], iscrowd=2), "box"),
        *(said(7, " "), said(7, 5), said(7, "\ud800"), said(7, "x" * 70_000), said(70, "nobody")),
    ]
    text = coco([*THINGS, *bad]).replace(b"Infinity", b"1e999")
    write(folder, {"things.json": text})
    out = converted(folder, "coco", max_rejects=1.0, **given(folder))
    assert summary(out)["annotations"] == {
        "read": len(THINGS) + len(bad),
        "rejected": {
            "annotation_unreadable": 4,
            "box_empty": 4,
            "box_outside": 2,
            "box_unreadable": 6,
            "caption_bad_utf8": 1,
            "caption_empty": 1,
            "caption_not_text": 1,
            "caption_too_long": 1,
            "category_unknown": 1,
            "image_unknown": 2,
        },
    }
    assert summary(out)["boxes"] == len(THINGS)
    listed = [json.loads(line) for line in (out / "convert/annotations.jsonl").read_text().splitlines()]
    assert {"key": "a.jpg", "reason": "category_unknown"}.items() <= next(
        one for one in listed if one["reason"] == "category_unknown"
    ).items()
    told = refusal(folder, "coco", dest=str(folder / "other"), **given(folder))
    assert f"23 of {len(THINGS) + len(bad)} annotations cannot be used" in told
    assert not (folder / "other").exists()


def test_images_that_cannot_be_used_are_counted_by_their_reasons(folder: Path) -> None:
    sizes = {"a.jpg": (64, 32), "b.jpg": (32, 64), "c.png": (48, 48), "gone.jpg": (8, 8), "d.gif": (8, 8)}
    sizes |= {"x.labels.png": (8, 8), "a.png": (8, 8), "wide.jpg": (9, 8), "text.jpg": (8, 8), "cut.png": (8, 8)}
    sizes |= {
        "link.png": (8, 8),
        "turned.jpg": (8, 16),
        "upright.jpg": (16, 8),
        "upside.jpg": (8, 8),
        "few.png": (8, 8),
    }
    files = {
        name: picture((8, 8), name) for name in sizes if name not in ("gone.jpg", "link.png", "a.jpg", "b.jpg", "c.png")
    }
    files |= {"text.jpg": b"no picture", "cut.png": picture((8, 8))[:20], "secret.png": picture((8, 8))}
    files |= {"turned.jpg": picture((8, 16), "x.jpg", 0, 6), "upright.jpg": picture((8, 16), "x.jpg", 0, 6)}
    files |= {"upside.jpg": picture((8, 8), "x.jpg", 0, 3)}
    secret = files.pop("secret.png")
    write(folder, {"secret.png": secret})
    write(folder / "images", files)
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    images = [*images_of(sizes), {"id": 99, "file_name": "a.jpg", "width": 64, "height": 32}, {"id": 100}, 5]
    every = [box(number, 1, [0, 0, 8, 8]) for number in range(7, 7 + len(sizes) - 1)]
    write(folder, {"things.json": coco(every, images=images)})
    out = converted(folder, "coco", max_rejects=1.0, min_boxes=1, **given(folder))
    assert summary(out)["rejected"] == {
        "entry_unreadable": 2,
        "filter:min_boxes": 1,
        "image_format": 1,
        "image_missing": 1,
        "image_outside": 1,
        "image_repeated": 1,
        "image_size": 1,
        "image_turned": 2,
        "image_truncated": 1,
        "image_unreadable": 1,
        "key_repeated": 1,
        "name_unusable": 1,
    }
    assert set(members(out)) == {"a.json", "b.json", "c.json", "upright.json"}


def test_limits_hold_for_images(folder: Path) -> None:
    settings = given(folder) | {"max_rejects": 1.0}
    few = converted(folder, "coco", limits=LimitsConfig(pixels=2047), dest=str(folder / "few"), **settings)
    assert summary(few)["rejected"] == {"image_too_large": 3}
    assert list(few.glob("*.tar")) == []
    most = (folder / "images" / "a.jpg").stat().st_size
    some = converted(folder, "coco", limits=LimitsConfig(member_bytes=most), dest=str(folder / "some"), **settings)
    assert summary(some)["rejected"]["image_too_large"] >= 1
    assert "a.json" in members(some)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{}", "it has no list of annotations and of images"),
        (b'{"images": [], "annotations": {}}', "its 'annotations' is no list"),
        (coco(THINGS)[:-1], "it is cut, or no JSON"),
        (coco(THINGS)[:300], "it is cut, or no JSON"),
        (coco(THINGS) + b"x", "something follows its end"),
        (coco(THINGS).replace(b"32.5", b"NaN"), "NaN, which is no number"),
        (coco(THINGS).replace(b'"license"', b'"id"', 1), "names 'id' twice"),
        (coco(THINGS).replace(b"toothbrush", b"\xff"), "not UTF-8"),
        (coco(THINGS, categories=[{"id": 1}]), "a category lacks its id or name"),
        (coco([{"image_id": 7, "segments_info": []}]), "panoptic"),
        (coco(THINGS, categories=[{"id": 1, "name": "two\nlines"}, {"id": 90, "name": "x"}]), "several lines"),
        (coco(THINGS, categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category 1 is b, and a before"),
    ],
)
def test_a_file_that_is_none_of_cocos_is_refused_and_named(folder: Path, data: bytes, words: str) -> None:
    write(folder, {"bad.json": data})
    told = refusal(folder, "coco", **given(folder, "bad.json"))
    assert words in told
    assert "bad.json" in told or "names of boxes" in told
    assert not (folder / "out").exists()


def test_files_that_contradict_each_other_are_refused(folder: Path) -> None:
    write(folder, {"other.json": coco([], images=images_of({"x.jpg": (64, 32)}))})
    assert "image 7 is x.jpg" in refusal(folder, "coco", **given(folder, "things.json", "other.json"))
    write(folder, {"other.json": coco([], categories=[{"id": 90, "name": "comb"}])})
    assert "category 90 is comb" in refusal(folder, "coco", **given(folder, "things.json", "other.json"))
    assert "is given twice" in refusal(folder, "coco", **given(folder, "things.json", "things.json"))
    assert "did you mean person?" in refusal(folder, "coco", leave_out=("persons",), **given(folder))
    many = [{"id": number, "name": f"c{number}"} for number in range(1100)]
    write(folder, {"other.json": coco([], categories=many)})
    assert "give crowds=same" in refusal(folder, "coco", **given(folder, "other.json"))


def test_pieces_in_which_a_file_is_read_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = converted(folder, "coco", dest=str(folder / "whole"), **given(folder))
    monkeypatch.setattr(json_lists, "PIECE", 7)
    monkeypatch.setattr("preprocess.converting.boxes.BLOCK", 3)
    pieces = converted(folder, "coco", **given(folder))
    assert {path.name: path.read_bytes() for path in whole.glob("*.*")} == {
        path.name: path.read_bytes() for path in pieces.glob("*.*")
    }


def test_outlines_take_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "PIECE", 4096)
    monkeypatch.setattr(streams, "PIECE", 4096)
    outline = [[round(0.1 * i, 1) for i in range(500)]]
    write(folder, {"things.json": coco([box(7, 1, [0, 0, 9, 9], segmentation=outline)] * 600)})
    size = (folder / "things.json").stat().st_size
    (file,) = opened((str(folder / "things.json"),))
    tracemalloc.start()
    Coco(ConvertConfig(from_="coco", images="", dest="")).read(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 1e6
    assert peak < 2.5e5
    assert file.input.bytes == size


def test_the_command_that_is_printed_is_one_that_encode_takes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {"captions.json": coco([said(7, "a")], categories=None)})
    for names, conditions, text in ((("things.json",), ("boxes",), "none"), (("captions.json",), (), "")):
        dest = str(folder / "it's" / names[0])
        converted(folder, "coco", dest=dest, **given(folder, *names))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "encode them with" in line]
        config = load("encode", shlex.split(line)[5:])
        assert (config.conditions, config.text_storage) == (conditions, text)
        assert config.source == f"{dest}/*.tar"
        assert config.boxes.names == (f"{dest}/boxes.txt" if conditions else "")
