"""A run keeps wandb's id when it goes on or is moved, and a copy of it gets another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage.urls import open_storage
from pipeline.tracking.identity import ID, ID_KEY, PLACE_KEY, identity_of


def identity(folder: Path | str) -> str:
    return identity_of(open_storage(str(folder)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that was tracked once."""
    (tmp_path / "a").mkdir()
    identity(tmp_path / "a")
    return tmp_path / "a"


def test_a_run_that_goes_on_keeps_its_id_however_its_path_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identity(run)
    assert ID.fullmatch(first) and (run / ID_KEY).read_text() == first
    monkeypatch.chdir(run)
    assert identity(".") == identity(f"{run}/../a/") == first
    assert sorted(path.name for path in run.iterdir()) == [ID_KEY, PLACE_KEY]


def test_a_copy_gets_an_id_of_its_own_and_the_original_keeps_its_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, fork = identity(run), tmp_path / "fork"
    shutil.copytree(run, fork)
    second = identity(fork)
    assert second != first
    assert f"{fork} is a copy of the run in {run}: wandb knows it as {second} from now on" in capsys.readouterr().err
    assert (identity(fork), identity(run)) == (second, first)
    shutil.copytree(fork, tmp_path / "third")
    assert identity(tmp_path / "third") not in (first, second)


def test_a_copy_that_was_copied_before_it_was_tracked_gets_one_too(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert len({identity(run), identity(tmp_path / "c"), identity(tmp_path / "b")}) == 3


def test_a_run_that_is_moved_keeps_its_id_though_another_run_begins_where_it_lay(run: Path, tmp_path: Path) -> None:
    first = identity(run)
    run.rename(tmp_path / "b")
    assert identity(tmp_path / "b") == first
    run.mkdir()
    assert identity(run) != first
    (tmp_path / "b").rename(tmp_path / "c")
    assert identity(tmp_path / "c") == first


def test_a_run_that_is_copied_and_then_removed_is_moved(run: Path, tmp_path: Path) -> None:
    """As mv does between disks, and rsync to another machine."""
    first = identity(run)
    shutil.copytree(run, tmp_path / "b")
    shutil.rmtree(run)
    assert identity(tmp_path / "b") == first


def test_one_directory_under_two_names_is_one_run(run: Path, tmp_path: Path) -> None:
    first = identity(run)
    (tmp_path / "link").symlink_to(run)
    assert identity(tmp_path / "link") == first
    (run / PLACE_KEY).write_text(str(tmp_path / "link"))  # as through another mount, which no path resolves
    assert identity(run) == first
    assert sorted(path.name for path in run.iterdir()) == [ID_KEY, PLACE_KEY]


def test_a_run_of_before_keeps_its_id(tmp_path: Path) -> None:
    (tmp_path / ID_KEY).write_text("0123abcd")
    assert identity(tmp_path) == "0123abcd"
    assert (tmp_path / PLACE_KEY).read_text() == os.path.realpath(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "",
        "\n",
        "relative",
        "/",
        "/dev",
        "/proc/self/mem",
        "/nonexistent",
        "a\0b",
        "/a\0b",
        "s3://",
        "http://h/x",
        "\udcff",
    ],
)
def test_a_strange_place_costs_no_error(run: Path, place: str) -> None:
    first = identity(run)
    (run / PLACE_KEY).write_bytes(place.encode("utf-8", "surrogateescape"))
    assert identity(run) in (first, (run / ID_KEY).read_text())


@pytest.mark.parametrize("content", [b"../../x", b"a/b", b"\x1b[31m", b"x" * 10_000, b"\xff\xfe", b"two words"])
def test_a_damaged_id_is_replaced(run: Path, content: bytes) -> None:
    (run / ID_KEY).write_bytes(content)
    assert ID.fullmatch(identity(run))


def test_no_other_bucket_is_asked_about_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's run directory names a bucket: nothing is requested of it."""
    monkeypatch.setattr("pipeline.tracking.identity.open_storage", None)
    (tmp_path / ID_KEY).write_text("0123abcd")
    (tmp_path / PLACE_KEY).write_text("s3://somebody-elses/run")
    assert identity(tmp_path) != "0123abcd"


def test_a_copy_in_a_bucket_gets_an_id_of_its_own_and_a_moved_run_keeps_it(s3: str) -> None:
    first = identity(f"{s3}/a")
    for key in (ID_KEY, PLACE_KEY):
        open_storage(f"{s3}/b").put(key, open_storage(f"{s3}/a").get(key))
    second = identity(f"{s3}/b")
    assert second != first and identity(f"{s3}/a/") == first
    for key in (ID_KEY, PLACE_KEY):
        open_storage(f"{s3}/c").put(key, open_storage(f"{s3}/b").get(key))
        open_storage(f"{s3}/b").delete(key)
    assert identity(f"{s3}/c") == second


def test_a_run_directory_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        identity(tmp_path / "file" / "run")
