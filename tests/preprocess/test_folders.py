"""Folders of images: the records that a tar of their files gives, in units that stay what they are while it grows."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from made.encode import config, files
from made.gathered import caption_of, identity, picture, tar_of, write_folder
from made.growing import _encoders, advised, keys, run, units  # noqa: F401
from pipeline.config import LaunchConfig, LimitsConfig, VerifyConfig
from pipeline.data.format.manifest import MANIFEST, load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import DataError, DestinationExists, ShardCorrupt, SourceError
from pipeline.storage.urls import open_storage
from preprocess import encode, verify
from preprocess.gathering import folder as listing
from preprocess.gathering.folder import FolderContents, FolderUnit, list_folder
from ranks import encode_worker


def proved(dest: Path, source: object) -> None:
    assert verify.main(VerifyConfig(dataset=str(dest), source=str(source), samples=16, min_psnr=0.0)) == 0


def quick(source: object, dest: object, **changes: Any) -> int:
    """Encodes crops, which takes no encoders."""
    return run(source, dest, **{"stored": "pixels", **changes})


def rejected(dest: Path) -> dict[str, int]:
    return load_manifest(open_storage(str(dest))).rejected


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of ten captioned pictures, three of them one folder deeper."""
    write_folder(tmp_path / "photos", range(7))
    return write_folder(tmp_path / "photos", range(3), under="more")


def test_a_folder_gives_the_very_tar_that_a_tar_of_its_files_gives(photos: Path, tmp_path: Path) -> None:
    tar = tar_of(photos, tmp_path / "t/0.tar")
    run(tar, tmp_path / "of-tar")
    run(photos, tmp_path / "of-folder")
    for name in ("000000.tar", "000000.index.json"):
        assert files(tmp_path / "of-folder")[name] == files(tmp_path / "of-tar")[name]
    proved(tmp_path / "of-folder", photos)


def test_units_are_the_sorted_samples_in_groups_of_a_stated_size_and_known_by_their_files(
    photos: Path, tmp_path: Path
) -> None:
    quick(photos, tmp_path / "c", unit_size=4)
    manifest = load_manifest(open_storage(str(tmp_path / "c")))
    assert [unit.source for unit in manifest.units] == ["photos@000000", "photos@000001", "photos@000002"]
    assert [unit.read for unit in manifest.units] == [4, 4, 2]
    assert keys(tmp_path / "c") == [f"{i:05d}" for i in range(7)] + [f"more/{i:05d}" for i in range(3)]
    names = [f"{key}.{suffix}" for key in ("more/00001", "more/00002") for suffix in ("png", "txt")]
    expected = identity([(name, (photos / name).read_bytes()) for name in names])
    assert (manifest.units[2].source_sha256, manifest.units[2].source_bytes) == expected
    proved(tmp_path / "c", photos)
    moved = tmp_path / "elsewhere/photos"
    shutil.copytree(photos, moved)
    proved(tmp_path / "c", moved)


def test_bytes_do_not_depend_on_workers_processes_or_place(photos: Path, tmp_path: Path) -> None:
    quick(photos, tmp_path / "one", unit_size=3)
    quick(photos, tmp_path / "four", unit_size=3, workers=4)
    shutil.copytree(photos, tmp_path / "x/photos")
    two = LaunchConfig(processes=2, threads=1)
    assert quick(tmp_path / "x/photos", tmp_path / "two", unit_size=3, launch=two) == 0
    assert files(tmp_path / "one") == files(tmp_path / "four") == files(tmp_path / "two")


def test_a_kill_at_any_write_and_a_rerun_end_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_folder(tmp_path / "s", range(3)))
    clean = tmp_path / "clean"
    encode.main(config(source, clean, unit_size=2))
    monkeypatch.setattr("preprocess.encoding.claims.POLL", 0.01)

    def killed(n: int) -> bool:
        dest, output = tmp_path / f"killed-{n:02d}", tmp_path / "output"
        work = config(source, dest, unit_size=2, claim_seconds=60.0)
        status = encode_worker.wait(encode_worker.start(encode_worker.die_at_change, output, work, n, False))
        assert status in (0, -signal.SIGKILL), output.read_text()
        assert encode.main(config(source, dest, unit_size=2, claim_seconds=0.1)) == 0
        assert files(dest) == files(clean), dest.name
        return status != 0

    # List of files, plan, empty caption; claim, tar, index, report and the claim's end, twice; two manifests, card.
    assert [n for n in (2, 4, 16, 17) if killed(n)] == [2, 4, 16]


# --------------------------------------------------------------------------------------------------------------------
# Growth


def test_files_that_come_later_are_further_units_and_earlier_ones_stay(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(photos, tmp_path / "c", unit_size=4)
    before = files(tmp_path / "c")
    write_folder(photos, range(50, 55), under="a")  # sorted before "more", after the numbers
    quick(photos, tmp_path / "c", unit_size=4)
    assert units(tmp_path / "c") == [f"photos@{i:06d}" for i in range(5)]
    after = files(tmp_path / "c")
    for name, data in before.items():
        assert name in (MANIFEST, "card.html") or after[name] == data, name
    assert load_manifest(open_storage(str(tmp_path / "c"))).version == 2
    assert len(keys(tmp_path / "c")) == 15
    proved(tmp_path / "c", photos)
    quick(photos, tmp_path / "c", unit_size=4)
    assert files(tmp_path / "c") == after
    (photos / "z.txt").write_text("later")
    proved(tmp_path / "c", photos)  # what came later is no part of the cache


def test_a_folder_that_grows_while_it_is_encoded_is_finished_first(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = encode.encode_units
    monkeypatch.setattr(encode, "encode_units", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quick(photos, tmp_path / "c", unit_size=4)
    monkeypatch.setattr(encode, "encode_units", real)
    quick(photos, tmp_path / "whole", unit_size=4)
    write_folder(photos, [99], under="0")
    quick(photos, tmp_path / "c", unit_size=4)
    assert "1 samples that it did not hold" in caplog.text
    assert files(tmp_path / "c") == files(tmp_path / "whole")
    quick(photos, tmp_path / "c", unit_size=4)
    assert units(tmp_path / "c")[-1] == "photos@000003"
    assert "0/00099" in keys(tmp_path / "c")


def test_a_file_that_is_gone_is_named(photos: Path, tmp_path: Path) -> None:
    quick(photos, tmp_path / "c", unit_size=4)
    for suffix in ("png", "txt"):
        (photos / f"00005.{suffix}").unlink()
    with pytest.raises(SourceError, match=r"photos/00005 is gone, with all its files: the unit photos@000001"):
        quick(photos, tmp_path / "c", unit_size=4)
    with pytest.raises(SourceError, match=r"photos/00005 is gone"):
        proved(tmp_path / "c", photos)


@pytest.mark.parametrize("changed", ["same size", "another size", "a text more", "a text less"])
def test_a_file_that_has_changed_is_refused_and_its_unit_can_be_encoded_anew(
    photos: Path, tmp_path: Path, changed: str
) -> None:
    quick(photos, tmp_path / "c", unit_size=10)
    text = photos / "00005.txt"
    if changed == "same size":
        text.write_text(caption_of(5).replace("red", "tan"))
    elif changed == "another size":
        text.write_text("a green square")
    elif changed == "a text more":
        (photos / "00005.json").write_text("{}")
    else:
        text.unlink()
    with pytest.raises(DataError):
        proved(tmp_path / "c", photos)
    with pytest.raises(DestinationExists, match=r"is another photos@000000 than the one that .* was made from") as told:
        quick(photos, tmp_path / "c", unit_size=10)
    assert advised(str(told.value), "forget") == ["forget=[photos@000000]"]
    quick(photos, tmp_path / "c", unit_size=10, forget=("photos@000000",))
    quick(photos, tmp_path / "c", unit_size=10)
    proved(tmp_path / "c", photos)
    quick(photos, tmp_path / "fresh", unit_size=10)
    assert files(tmp_path / "c") == files(tmp_path / "fresh")


def test_another_unit_size_is_refused_with_the_one_it_was_begun_with(photos: Path, tmp_path: Path) -> None:
    quick(photos, tmp_path / "c", unit_size=4)
    with pytest.raises(DestinationExists, match=r"was begun with unit_size=4, not unit_size=5"):
        quick(photos, tmp_path / "c", unit_size=5)


def test_two_folders_of_one_name_and_tars_grow_one_dataset(photos: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "y/photos", range(20, 25))
    tar = tar_of(write_folder(tmp_path / "f", [40]), tmp_path / "t/0.tar")
    quick(photos, tmp_path / "c", unit_size=4)
    quick(other, tmp_path / "c", unit_size=4)
    quick(tar, tmp_path / "c", unit_size=4)
    assert units(tmp_path / "c")[3:] == ["y/photos@000000", "y/photos@000001", "0.tar"]
    proved(tmp_path / "c", f"{{{photos},{other},{tar}}}")
    write_folder(other, [30])
    with pytest.raises(DestinationExists, match="give all of them with those that are to be appended"):
        quick(other, tmp_path / "c", unit_size=4)
    quick(f"{{{photos},{other},{tar}}}", tmp_path / "c", unit_size=4)
    assert units(tmp_path / "c")[-1] == "y/photos@000002"


def test_several_resolutions_of_a_folder_share_their_units(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "c", unit_size=4, resolution=(32, 64))
    run(photos, tmp_path / "d", unit_size=4)
    assert files(tmp_path / "c/64") == files(tmp_path / "d")


# --------------------------------------------------------------------------------------------------------------------
# What is in a folder


def test_hidden_files_and_those_of_other_kinds_are_passed_over(photos: Path, tmp_path: Path) -> None:
    quick(photos, tmp_path / "c")
    for name in ("._00001.png", ".hidden.png", ".git/x.png", "__MACOSX/00001.png", "notes.md", "00001.gif"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"x")
    quick(photos, tmp_path / "d")
    assert files(tmp_path / "c") == files(tmp_path / "d")


@pytest.mark.parametrize(
    ("target", "what"),
    [("../secret.png", "out of the folder"), ("gone.png", "a link to nothing"), ("more", "a link to a folder")],
)
def test_links_out_of_the_folder_are_refused(photos: Path, tmp_path: Path, target: str, what: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture(99))
    (photos / "link.png").symlink_to(target)
    with pytest.raises(SourceError, match=rf"photos/link\.png is a link to .*{what}|{what}"):
        quick(photos, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_link_within_the_folder_is_its_file(photos: Path, tmp_path: Path) -> None:
    (photos / "link.png").symlink_to("more/00002.png")
    (photos / "link.txt").write_text("a link")
    run(photos, tmp_path / "c")
    storage = open_storage(str(tmp_path / "c"))
    found = {record.meta["key"]: record for record in first_records(storage, load_manifest(storage), 99)}
    assert (found["link"].members["moments"] == found["more/00002"].members["moments"]).all()


def test_a_pipe_and_a_name_that_is_no_text_are_refused(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(photos / "pipe.png")
    with pytest.raises(SourceError, match=r"pipe\.png is a pipe, a socket or a device"):
        quick(photos, tmp_path / "c")
    (photos / "pipe.png").unlink()
    (photos / os.fsdecode(b"\xff.png")).write_bytes(picture(1))
    with pytest.raises(SourceError, match="its name is not UTF-8"):
        quick(photos, tmp_path / "c")


def test_a_file_that_changes_while_it_is_read_damages_its_unit(photos: Path, tmp_path: Path) -> None:
    folder = list_folder(open_storage(str(photos)), str(photos))
    for change, what in (("shorter", r"00003\.png has changed"), ("gone", r"00003\.png is gone")):
        if change == "gone":
            (photos / "00003.png").unlink()
        else:
            (photos / "00003.png").write_bytes(b"x")
        with (
            FolderUnit(FolderContents(folder, folder.keys(), "photos@000000"), LimitsConfig(), "photos@000000") as unit,
            pytest.raises(ShardCorrupt, match=rf"photos@000000: {what}.*leave_out=\[photos@000000\]"),
        ):
            list(unit.samples())


def test_a_file_beyond_the_limit_is_a_counted_reject_of_a_known_unit(photos: Path, tmp_path: Path) -> None:
    (photos / "00003.png").write_bytes(b"x" * 100_000)
    quick(photos, tmp_path / "c", limits=LimitsConfig(member_bytes=50_000), max_rejects=0.5)
    assert rejected(tmp_path / "c") == {"file_too_large": 1}
    proved(tmp_path / "c", photos)
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))
    unit = load_manifest(open_storage(str(tmp_path / "c"))).units[0]
    assert unit.source_sha256 == identity([(name, (photos / name).read_bytes()) for name in names])[0]


def test_each_folder_is_listed_once_however_many_units_there_are(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, real = list[str](), listing._entries

    def looking(place: str) -> list[os.DirEntry[str]]:
        looks.append(place)
        return real(place)

    monkeypatch.setattr(listing, "_entries", looking)
    quick(photos, tmp_path / "c", unit_size=1)
    assert len(looks) == 2  # photos and photos/more


def test_a_folder_and_the_destination_may_not_lie_in_each_other(photos: Path, tmp_path: Path) -> None:
    for dest in (photos / "cache", photos, tmp_path):
        with pytest.raises(DestinationExists, match="choose a dest outside"):
            quick(photos, dest)
    with pytest.raises(SourceError, match="one lies in the other"):
        quick(f"{{{photos},{photos}/more}}", tmp_path / "c")


def test_a_folder_without_images_says_how_shards_are_named(tmp_path: Path) -> None:
    tar_of(write_folder(tmp_path / "f", [1]), tmp_path / "s/0.tar")
    with pytest.raises(
        SourceError, match=r"is a folder without images .*; name its shards, for example '.*/s/\*\.tar'"
    ):
        quick(tmp_path / "s", tmp_path / "c")


def test_a_dry_run_of_a_folder_counts_its_samples(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(photos, tmp_path / "c", unit_size=5, dry_run=True)
    assert "2 shards" in (told := capsys.readouterr().out) and "about 10 samples" in told
    assert not (tmp_path / "c").exists()


def test_a_folder_in_a_bucket_gives_what_it_gives_on_a_disk(photos: Path, tmp_path: Path, s3: str) -> None:
    run(photos, tmp_path / "c", unit_size=4)
    bucket = open_storage(f"{s3}/photos")
    for path in sorted(path for path in photos.rglob("*") if path.is_file()):
        bucket.put(path.relative_to(photos).as_posix(), path.read_bytes())
    bucket.put(".hidden/x.png", b"x")
    for source in (f"{s3}/photos/", f"{s3}/photos"):
        run(source, tmp_path / "d", unit_size=4)
    named = ("contract.json", "manifest.json", "manifests/000001.json", "card.html")
    made, again = files(tmp_path / "c"), files(tmp_path / "d")
    assert {name: made[name] for name in made if name not in named} == {
        name: again[name] for name in again if name not in named
    }
    proved(tmp_path / "d", f"{s3}/photos")
