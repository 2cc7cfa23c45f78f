"""convert makes the same bytes however often it was interrupted, and writes over nothing that is not its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from made.annotated import box, coco, converted, images_of, picture, refusal, said, summary, write, write_pictures
from made.encode import files
from pipeline.config import ConvertConfig
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage
from preprocess import convert
from preprocess.converting import tars

SIZES = {f"{number:02d}.png": (8, 8 + number) for number in range(7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", SIZES)
    every = [box(number, 1, [0, 0, 4, number]) for number in range(7, 14)]
    told = [said(number, f"number {number}") for number in range(7, 14)]
    things = coco([*every, *told, box(7, 1, [0, 0, 0, 0])], images=images_of(SIZES))
    return write(tmp_path, {"things.json": things})


def given(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"annotations": (str(folder / "things.json"),), "shard_size": 2, **changes}


@pytest.fixture
def whole(folder: Path) -> dict[str, bytes]:
    """What an uninterrupted run makes."""
    return files(converted(folder, "coco", dest=str(folder / "whole"), **given(folder)))


def test_tars_hold_what_convert_json_says(whole: dict[str, bytes]) -> None:
    said_of = json.loads(whole["convert.json"])
    held = {name: data for name, data in whole.items() if name.endswith(".tar")}
    assert list(held) == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    assert {name: entry["sha256"] for name, entry in said_of["tars"].items()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in held.items()
    }
    assert [entry["images"] for entry in said_of["tars"].values()] == [2, 2, 2, 1]
    assert (said_of["images"], said_of["boxes"], said_of["captions"]) == (7, 7, 7)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("at", ["tar", "report", "summary"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, at: str, threads: int
) -> None:
    """Killed before the third tar was published, before its report was, and before convert.json was."""
    monkeypatch.setattr(convert, "cores", lambda: threads)
    put, put_file = LocalStorage.put, LocalStorage.put_file
    keys = {"report": "convert/00002.json", "summary": "convert.json"}

    def killed_put(storage: LocalStorage, key: str, data: bytes) -> None:
        if key == keys.get(at):
            raise KeyboardInterrupt
        put(storage, key, data)

    def killed_file(storage: LocalStorage, key: str, path: Path) -> None:
        if at == "tar" and key == "00002.tar":
            raise KeyboardInterrupt
        put_file(storage, key, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put", killed_put)
        patch.setattr(LocalStorage, "put_file", killed_file)
        with pytest.raises(KeyboardInterrupt):
            converted(folder, "coco", **given(folder))
    out = folder / "out"
    assert ("00002.tar" in files(out)) == (at != "tar")
    assert "convert.json" not in files(out)
    first, made = (out / "00000.tar").stat().st_ino, list[int]()
    make = tars.make

    def counted(storage: Any, number: int, *arguments: Any) -> Any:
        made.append(number)
        return make(storage, number, *arguments)

    monkeypatch.setattr(convert, "make", counted)
    converted(folder, "coco", **given(folder))
    assert files(out) == whole
    assert (out / "00000.tar").stat().st_ino == first
    assert 0 not in made and (2 in made) == (at != "summary")
    made.clear()
    converted(folder, "coco", **given(folder))
    assert made == [] and files(out) == whole


@pytest.mark.parametrize("harm", ["cut", "gone", "report"])
def test_a_tar_that_was_lost_is_made_again(folder: Path, whole: dict[str, bytes], harm: str) -> None:
    out = converted(folder, "coco", **given(folder))
    if harm == "cut":
        (out / "00001.tar").write_bytes(whole["00001.tar"][:-1])
    elif harm == "gone":
        (out / "00001.tar").unlink()
    else:
        (out / "convert/00001.json").write_bytes(b'{"plan": 1}')
    converted(folder, "coco", **given(folder))
    assert files(out) == whole


def test_what_an_abandoned_process_left_is_removed_and_no_fresh_file_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = converted(folder, "coco", **given(folder))
    left = out / ".staging.0123456789abcdef.tmp"
    left.write_bytes(b"x")
    converted(folder, "coco", **given(folder))
    assert left.exists()
    monkeypatch.setattr(convert, "ABANDONED_SECONDS", 0.0)
    converted(folder, "coco", **given(folder))
    assert not left.exists()


def test_another_conversion_and_what_is_nobodys_are_not_written_over(folder: Path, whole: dict[str, bytes]) -> None:
    out = converted(folder, "coco", **given(folder))
    for changes, words in (
        ({"shard_size": 3}, "shard_size="),
        ({"crowds": "same"}, "crowds="),
        ({"leave_out": ("banner",)}, "leave_out="),
    ):
        told = refusal(folder, "coco", **given(folder, **changes))
        assert f"holds a conversion of something else (other {words}" in told
    write(folder / "images", {"00.png": picture((8, 8), "x.png", 99) + b"x"})
    assert "(other images)" in refusal(folder, "coco", **given(folder))
    text = (folder / "things.json").read_bytes()
    write_pictures(folder / "images", SIZES)
    write(folder, {"things.json": text.replace(b"number 7", b"number 8")})
    assert "(other files of annotations)" in refusal(folder, "coco", **given(folder))
    assert files(out) == whole
    write(folder, {"things.json": text, "taken/00007.tar": b"mine"})
    told = refusal(folder, "coco", dest=str(folder / "taken"), **given(folder))
    assert "taken holds 00007.tar, which would be written over" in told
    assert files(folder / "taken") == {"00007.tar": b"mine"}


def test_more_rejects_are_allowed_later_and_the_tars_stay(folder: Path) -> None:
    write(folder / "images", {"05.png": b"no picture"})
    told = refusal(folder, "coco", **given(folder))
    assert "1 of 7 images cannot be used (1 image_unreadable; the first: 05.png, image_unreadable" in told
    out = folder / "out"
    first = (out / "00000.tar").stat().st_ino
    assert not (out / "convert.json").exists()
    converted(folder, "coco", max_rejects=0.2, **given(folder))
    assert (out / "00000.tar").stat().st_ino == first
    assert summary(out)["rejected"] == {"image_unreadable": 1}
    line = json.loads((out / "convert/rejected.jsonl").read_text())
    assert (line["key"], line["reason"]) == ("05.png", "image_unreadable")


def test_nothing_that_is_stored_names_the_machine_or_its_folders(folder: Path) -> None:
    for name, data in files(converted(folder, "coco", **given(folder))).items():
        assert str(folder).encode() not in data, name


def test_a_conversion_on_s3_is_the_one_on_a_disk(folder: Path, whole: dict[str, bytes], s3: str) -> None:
    storage = open_storage(f"{s3}/in")
    for name, data in files(folder / "images").items():
        storage.put(f"images/{name}", data)
    storage.put("things.json", (folder / "things.json").read_bytes())
    settings = given(folder, annotations=(f"{s3}/in/things.json",))
    convert.main(ConvertConfig(from_="coco", images=f"{s3}/in/images", dest=f"{s3}/out", **settings))
    made = open_storage(f"{s3}/out")
    found = {info.key: made.get(info.key) for info in made.list()}
    named = ("convert/", "convert.json")  # they hold the plan, which names the folder of the images
    assert {key: data for key, data in found.items() if not key.startswith(named)} == {
        key: data for key, data in whole.items() if not key.startswith(named)
    }
