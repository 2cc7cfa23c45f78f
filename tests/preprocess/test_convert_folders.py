"""convert from=classes and from=labels: folders as annotations."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.annotated import cached, converted, greys, picture, refusal, summary, write, write_pictures
from pipeline.config.conditions import ClassesConfig, LabelsConfig

FLOWERS = {
    "tulip/a.jpg": (32, 32),
    "rose/deep/er/b.JPEG": (40, 32),
    "a daisy/c.png": (32, 48),
    "rose/ü.jpg": (32, 32),
    f"rose/{'long' * 30}.jpg": (32, 32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", FLOWERS)
    write(tmp_path / "images", {"readme.md": b"", "._a.jpg": b"x", "rose/.hidden.jpg": b"x", "__MACOSX/a.jpg": b"x"})
    return tmp_path


def classes_of(out: Path, dest: Path) -> dict[str, int]:
    names = ClassesConfig(names=str(out / "classes.txt"))
    _, records = cached(out, dest, conditions=("class",), classes=names)
    return {key: int(record.members["cond.class"]) for key, record in records.items()}


def test_classes_arrive_in_the_cache_numbered_by_the_names_of_their_folders(folder: Path) -> None:
    out = converted(folder, "classes")
    assert (out / "classes.txt").read_text() == "a daisy\nrose\ntulip\n"
    long = f"rose/{'long' * 30}"
    expected = {"a daisy/c": 0, "rose/deep/er/b": 1, long: 1, "rose/ü": 1, "tulip/a": 2}
    assert classes_of(out, folder / "cache") == expected
    assert summary(out)["passed_over"] == 4


def test_a_validation_set_without_a_folder_has_the_numbers_of_the_training_set(folder: Path) -> None:
    out = converted(folder, "classes")
    write_pictures(folder / "val", {"tulip/v.jpg": (32, 32)})
    names = str(out / "classes.txt")
    val = converted(folder, "classes", images=str(folder / "val"), dest=str(folder / "v"), names=names)
    assert (val / "classes.txt").read_bytes() == (out / "classes.txt").read_bytes()
    assert classes_of(val, folder / "cache") == {"tulip/v": 2}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("map.txt", "n01440764 tench, Tinca tinca\nn01443537\tgoldfish\n"),
        ("map.txt", "\ufeffn01440764\ttench, Tinca tinca\r\nn01443537 goldfish\r\n"),
        ("index.json", '{"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench, Tinca tinca"]}'),
    ],
)
def test_files_of_imagenets_names_are_read(tmp_path: Path, file: str, text: str) -> None:
    write_pictures(tmp_path / "images", {"n01443537/x.JPEG": (32, 32), "n01440764/y.JPEG": (32, 32)})
    write(tmp_path, {file: text.encode()})
    out = converted(tmp_path, "classes", names=str(tmp_path / file))
    assert (out / "classes.txt").read_text() == "tench, Tinca tinca\ngoldfish\n"
    assert classes_of(out, tmp_path / "cache") == {"n01443537/x": 1, "n01440764/y": 0}


def test_images_without_a_class_are_counted(folder: Path) -> None:
    write(folder / "images", {"loose.jpg": picture((8, 8), "x.jpg")})
    write(folder, {"names.json": b'["rose", "tulip"]'})
    names = str(folder / "names.json")
    out = converted(folder, "classes", names=names, max_rejects=1.0)
    assert summary(out)["rejected"] == {"class_missing": 1, "class_unknown": 1}
    assert "2 of 6 images cannot be used" in refusal(folder, "classes", names=names, dest=str(folder / "x"))


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("n.txt", b"", "it holds no names"),
        ("n.txt", b"rose\n\ntulip", "a line is empty"),
        ("n.txt", b"rose\nrose", "names the folder rose twice"),
        ("n.txt", b"Rose\nTulip", "names none of the folders"),
        ("n.json", b'{"0": "rose"}', "no pairs of folder and name"),
        ("n.json", b'{"1": ["rose", "a"]}', "the numbers 0 to 0 are wanted"),
        ("n.json", b'{"0": ["rose", "a"], "00": ["rose", "a"]}', "a number twice"),
        ("n.json", b"[1]", "no text"),
        ("n.json", b"[", "not JSON"),
    ],
)
def test_a_bad_file_of_folders_is_refused_and_named(folder: Path, file: str, data: bytes, words: str) -> None:
    write(folder, {file: data})
    told = refusal(folder, "classes", names=str(folder / file))
    assert words in told
    assert file in told


def test_a_folder_without_images_is_refused(folder: Path) -> None:
    assert "there is no file in this folder" in refusal(folder, "classes", images=str(folder / "gone"))
    write(folder / "flat", {"a.jpg": b"x"})
    assert "it holds no folder with images" in refusal(folder, "classes", images=str(folder / "flat"))
    (folder / "images" / "link").symlink_to(folder / "flat")
    assert "link is a link to a folder" in refusal(folder, "classes")
    assert "choose another dest" in refusal(folder, "classes", dest=str(folder / "images" / "out"))


# --------------------------------------------------------------------------------------------------------------------
# Label maps


def halves(left: int, right: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """A map (H, W) of two values."""
    values = np.full(size[::-1], left, dtype=np.uint8)
    values[:, size[0] // 2 :] = right
    return values


def palette(values: np.ndarray) -> bytes:
    """A PNG of a palette's numbers (H, W)."""
    out = io.BytesIO()
    Image.fromarray(values).convert("P").save(out, "PNG")
    return out.getvalue()


def labels_of(out: Path, dest: Path, **settings: Any) -> dict[str, list[int]]:
    """The values of the left and right half of each cached map."""
    _, records = cached(out, dest, conditions=("labels",), labels=LabelsConfig(grid=8, **settings))
    found = {}
    for key, record in records.items():
        labels = record.members["cond.labels"]
        assert (labels == halves(int(labels[0, 0]), int(labels[0, 31]))).all()
        found[key] = [int(labels[0, 0]), int(labels[0, 31])]
    return found


def test_label_maps_are_copied_and_the_largest_label_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "images", {"x/a.jpg": (32, 32), "b.jpg": (32, 32)})
    maps = {"x/a.png": greys(halves(0, 150)), "b.png": greys(halves(7, 3)), "unused.png": b""}
    write(tmp_path / "maps", maps)
    out = converted(tmp_path, "labels", labels=str(tmp_path / "maps"))
    with tarfile.open(out / "00000.tar") as tar:
        stored = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    assert stored["x/a.labels.png"] == maps["x/a.png"]
    assert stored["b.jpg"] == (tmp_path / "images" / "b.jpg").read_bytes()
    assert not (out / "labels.txt").exists()
    told = capsys.readouterr().out
    assert "the largest label is 150" in told and "labels.count=151 'conditions=[labels]'" in told
    assert labels_of(out, tmp_path / "cache", count=151) == {"x/a": [0, 150], "b": [7, 3]}


@pytest.mark.parametrize("place", ["images", "maps"])
def test_values_with_holes_are_numbered_anew_and_named(tmp_path: Path, place: str) -> None:
    """As Cityscapes has them: maps end otherwise than images do, and may lie beside them."""
    names = b'{"7": "road", "33": " bicycle", "255": "void", "8": "sidewalk"}'
    write(tmp_path, {"names.json": names})
    write_pictures(tmp_path / "images", {"aachen/1_left.png": (32, 32), "2_left.jpg": (32, 32), "other.jpg": (8, 8)})
    maps = {"aachen/1_ids.png": greys(halves(7, 255)), "2_ids.png": palette(halves(33, 8))}
    write(tmp_path / place, maps)
    settings = {"image_end": "_left", "label_end": "_ids", "names": str(tmp_path / "names.json")}
    out = converted(tmp_path, "labels", labels=str(tmp_path / place), **settings)
    assert (out / "labels.txt").read_text() == "road\nsidewalk\nbicycle\nvoid\n"
    found = labels_of(out, tmp_path / "cache", names=str(out / "labels.txt"))
    assert found == {"aachen/1_left": [0, 3], "2_left": [2, 1]}
    assert (summary(out)["images"], summary(out)["rejected"], summary(out)["passed_over"]) == (2, {}, 1)


def test_maps_may_lie_beside_their_images_under_the_same_name(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", {"a.jpg": (32, 32), "b.jpg": (32, 32)})
    write(tmp_path / "images", {"a.png": greys(halves(1, 2)), "b.png": greys(halves(2, 3))})
    out = converted(tmp_path, "labels", labels=str(tmp_path / "images"))
    assert labels_of(out, tmp_path / "cache", count=4) == {"a": [1, 2], "b": [2, 3]}


def test_maps_that_cannot_be_used_are_counted_by_their_reasons(tmp_path: Path) -> None:
    bad = {
        "fine": greys(halves(0, 1)),
        "small": greys(halves(0, 1, (16, 32))),
        "deep": greys(halves(0, 1).astype(np.uint16)),
        "colours": picture((32, 32)),
        "cut": greys(np.random.default_rng(0).integers(0, 2, (32, 32), dtype=np.uint8))[:-40],
        "jpeg": picture((32, 32), "x.jpg"),
        "unnamed": greys(halves(0, 9)),
    }
    write_pictures(tmp_path / "images", {f"{name}.jpg": (32, 32) for name in [*bad, "missing"]})
    write(tmp_path / "maps", {f"{name}.png": data for name, data in bad.items()})
    write(tmp_path, {"names.txt": b"none\nthing\n"})
    settings = {"labels": str(tmp_path / "maps"), "names": str(tmp_path / "names.txt"), "max_rejects": 1.0}
    out = converted(tmp_path, "labels", **settings)
    assert summary(out)["rejected"] == {
        "label_unknown": 1,
        "labels_missing": 1,
        "labels_size": 1,
        "labels_unreadable": 4,
    }
    assert labels_of(out, tmp_path / "cache", count=2) == {"fine": [0, 1]}


def test_a_folder_of_maps_that_fit_no_image_is_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", {"a.jpg": (32, 32)})
    write(tmp_path / "maps", {"a_seg.png": greys(halves(0, 1))})
    told = refusal(tmp_path, "labels", labels=str(tmp_path / "maps"))
    assert "no image has a label map there: a.jpg would have a.png; look at image_end= and label_end=" in told
    write(tmp_path, {"names.json": b'{"256": "x"}'})
    told = refusal(
        tmp_path, "labels", labels=str(tmp_path / "maps"), label_end="_seg", names=str(tmp_path / "names.json")
    )
    assert "it names the value 256" in told
