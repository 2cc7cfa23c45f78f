"""Metadata files beside images, and trees of a folder for each class: values that a sample has by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from made.gathered import picture, write_folder
from made.growing import _encoders, run  # noqa: F401
from pipeline.config import FiltersConfig, VerifyConfig
from pipeline.config.conditions import ClassesConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import ConfigError, SourceError
from pipeline.storage.urls import open_storage
from preprocess import verify


def proved(dest: Path, source: object) -> None:
    assert verify.main(VerifyConfig(dataset=str(dest), source=str(source), samples=16, min_psnr=0.0)) == 0


def rejected(dest: Path) -> dict[str, int]:
    return load_manifest(open_storage(str(dest))).rejected


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three captioned pictures."""
    return write_folder(tmp_path / "photos", range(3))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_of_metadata_are_the_json_of_their_images(tmp_path: Path, kind: str) -> None:
    for under, numbers in (("", range(3)), ("deep", range(3, 5))):
        place = tmp_path / "photos" / under
        place.mkdir(parents=True, exist_ok=True)
        rows = []
        for number in numbers:
            (place / f"{number}.png").write_bytes(picture(number))
            rows.append({"file_name": f"{number}.png", "text": f'a "big", red\ncircle {number}', "score": number})
        rows.append({"file_name": "gone.png", "text": "nothing", "score": 9})
        if kind == "jsonl":
            data = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            cells = [[str(cell).replace('"', '""') for cell in row.values()] for row in rows]
            data = "file_name,text,score\r\n" + "".join(f'"{a}","{b}","{c}"\r\n' for a, b, c in cells)
        (place / f"metadata.{kind}").write_text(data, newline="")
    changes = {"caption_key": ("json:text",), "filters": FiltersConfig(keep=("score>=1",)), "max_rejects": 0.9}
    run(tmp_path / "photos", tmp_path / "c", **changes)
    assert rejected(tmp_path / "c") == {"image_missing": 2, "filter:score>=1": 1}
    storage = open_storage(str(tmp_path / "c"))
    found = {r.meta["key"]: r.meta["caption"] for r in first_records(storage, load_manifest(storage), 99)}
    assert found == {
        **{f"{i}": f'a "big", red\ncircle {i}' for i in (1, 2)},
        **{f"deep/{i}": f'a "big", red\ncircle {i}' for i in (3, 4)},
    }
    proved(tmp_path / "c", tmp_path / "photos")


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("metadata.jsonl", b'{"file_name": "../x.png"}\n', r"line 1: file_name='\.\./x\.png' is absolute, empty"),
        ("metadata.jsonl", b'{"file_name": "/x.png"}\n', "line 1: file_name="),
        ("metadata.jsonl", b'{"file_name": "a\\u0000.png"}\n', "line 1: file_name="),
        ("metadata.jsonl", b'{"file_name": "\\ud800.png"}\n', "line 1: file_name="),
        ("metadata.jsonl", b'\n{"text": "x"}\n', "line 2: it has no file_name"),
        ("metadata.jsonl", b'{"file_name": 3}\n', "line 1: it has no file_name"),
        ("metadata.jsonl", b"[]\n", "line 1: json_unreadable: it is not an object"),
        ("metadata.jsonl", b"\xff\n", "byte 0: it is not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "00001.png"}\n' * 2, "00001.png has a row of metadata already"),
        ("metadata.csv", b"name,text\n", "names no column file_name"),
        ("metadata.csv", b"file_name,file_name\n", "or one twice"),
        ("metadata.csv", b"file_name,text\na.png\n", "line 2: 1 cells, and 2 are named"),
        ("metadata.csv", b'file_name,text\n"a.png,x\n', "line 2: "),
        ("metadata.csv", b"file_name,text\n,x\n", "line 2: it has no file_name"),
        ("metadata.csv", b"", "names no column file_name"),
    ],
)
def test_metadata_that_cannot_be_read_are_refused_with_the_line(
    photos: Path, tmp_path: Path, name: str, data: bytes, what: str
) -> None:
    (photos / name).write_bytes(data)
    with pytest.raises(SourceError, match=rf"{name}.*{what}"):
        run(photos, tmp_path / "c")


def test_an_image_with_a_json_and_a_row_is_rejected_and_one_without_a_row_has_no_caption(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", range(3))
    (folder / "00000.json").write_text('{"text": "mine"}')
    rows = [{"file_name": f"0000{i}.png", "text": f"row {i}"} for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(folder, tmp_path / "c", caption_key=("json:text",), max_rejects=0.9)
    assert rejected(tmp_path / "c") == {"metadata_repeated": 1, "caption_missing": 1}


def test_a_tree_of_classes_gives_each_image_the_number_of_its_folder(tmp_path: Path) -> None:
    for name, numbers in (("dog", [1, 2]), ("ant", [3]), ("cat", [4])):
        write_folder(tmp_path / "train", numbers, under=f"{name}/deep" if name == "cat" else name)
    write_folder(tmp_path / "train", [9])
    changes = {"conditions": ("class",), "classes": ClassesConfig(key="folder"), "max_rejects": 0.5}
    run(tmp_path / "train", tmp_path / "c", text_storage="none", **changes)
    storage = open_storage(str(tmp_path / "c"))
    manifest = load_manifest(storage)
    assert manifest.contract.conditions.classes is not None
    assert manifest.contract.conditions.classes.names == ("ant", "cat", "dog")
    found = {r.meta["key"]: int(r.members["cond.class"]) for r in first_records(storage, manifest, 99)}
    assert found == {"ant/00003": 0, "cat/deep/00004": 1, "dog/00001": 2, "dog/00002": 2}
    assert manifest.rejected == {"class_missing": 1}
    proved(tmp_path / "c", tmp_path / "train")


def test_classes_of_folders_want_folders(tmp_path: Path) -> None:
    changes = {"conditions": ("class",), "classes": ClassesConfig(key="folder")}
    folder = write_folder(tmp_path / "flat", [1])
    with pytest.raises(SourceError, match=r"flat holds no folders, and classes\.key=folder wants one for each class"):
        run(folder, tmp_path / "c", **changes)
    with pytest.raises(ConfigError, match="give the folder that holds a folder for each class"):
        run(tmp_path / "*.tar", tmp_path / "c", **changes)
