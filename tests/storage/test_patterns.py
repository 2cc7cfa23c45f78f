"""patterns.py: which objects a pattern names, and how large they are, on a disk and on a real S3 server."""

from __future__ import annotations

import glob
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SourceError, UserError
from pipeline.storage import braces
from pipeline.storage.base import ObjectInfo
from pipeline.storage.local import LocalStorage
from pipeline.storage.patterns import expand, sizes
from pipeline.storage.s3 import S3Storage
from pipeline.storage.urls import open_storage


@pytest.fixture(params=["local", "s3"])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A root with five shards."""
    root = str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/laion"
    for name in ("00000.tar", "00001.tar", "00002.tar", "00001.json", "deep/er/00009.tar"):
        open_storage(root).put(name, b"x")
    return root


def names(pattern: str) -> list[str]:
    return [storage.locate(key) for storage, key in expand(pattern)]


def test_braces_name_every_shard(shards: str) -> None:
    assert names(f"{shards}/{{00000..00002}}.tar") == [f"{shards}/0000{i}.tar" for i in range(3)]
    assert names(f"{shards}/{{00002,00000,00002}}.tar") == [f"{shards}/0000{i}.tar" for i in (0, 2)]


def test_globs_name_those_that_are_there(shards: str) -> None:
    assert names(f"{shards}/*.tar") == [f"{shards}/0000{i}.tar" for i in range(3)]
    assert names(f"{shards}/0000[01].tar") == [f"{shards}/0000{i}.tar" for i in (0, 1)]
    assert names(f"{shards}/**/*9.tar") == [f"{shards}/deep/er/00009.tar"]
    assert names(f"{shards}/0000?.json") == [f"{shards}/00001.json"]


def test_a_missing_shard_is_named(shards: str) -> None:
    with pytest.raises(SourceError, match=r"2 of the 5 shards cannot be found, the first missing is .*/00003\.tar"):
        expand(f"{shards}/{{00000..00004}}.tar")
    with pytest.raises(SourceError, match="absent"):
        expand(f"{shards}/absent.tar")


def test_nothing_found_is_an_error_that_names_the_pattern(shards: str) -> None:
    with pytest.raises(SourceError, match=r"\*\.nothing: nothing matches"):
        expand(f"{shards}/*.nothing")
    with pytest.raises(SourceError, match="braces"):
        expand(f"{shards}/{{00000..00004.tar")


def test_a_folder_as_source_is_told_how_to_name_its_shards(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a folder; name its shards, for example '.*/\*\.tar'"):
        expand(str(tmp_path))


def test_files_that_are_being_written_match_no_pattern(tmp_path: Path) -> None:
    LocalStorage(tmp_path).staging_path().write_bytes(b"half")
    with pytest.raises(SourceError, match="nothing matches"):
        expand(f"{tmp_path}/.*.tmp")


def test_sizes_are_in_the_order_of_the_places(shards: str) -> None:
    for number in range(3):
        open_storage(shards).put(f"0000{number}.tar", b"x" * (10 + number))
    places = expand(f"{shards}/{{00000..00002}}.tar") + expand(f"{shards}/deep/er/*.tar")
    assert sizes(places) == [10, 11, 12, 1]
    assert sizes(places[::-1]) == [1, 12, 11, 10]
    assert sizes([]) == []


def test_sizes_name_the_first_that_is_missing(shards: str) -> None:
    storage = open_storage(shards)
    with pytest.raises(SourceError, match=r"/00004\.tar cannot be found"):
        sizes([(storage, key) for key in ("00000.tar", "00004.tar", "00003.tar")])


def test_sizes_ask_s3_once_for_every_root(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.tar", "a/2.tar", "a/other", "b/1.tar"):
        open_storage(s3).put(name, name.encode() * 3)
    places = expand(f"{s3}/a/*.tar") + expand(f"{s3}/b/*.tar")
    listed_urls = []
    whole = S3Storage.list

    def list_(self: S3Storage, prefix: str = "") -> list[ObjectInfo]:
        listed_urls.append(self.locate(prefix))
        return whole(self, prefix)

    monkeypatch.setattr(S3Storage, "list", list_)
    monkeypatch.setattr(S3Storage, "stat", None)
    assert sizes(places) == [21, 21, 21]
    assert sorted(listed_urls) == [f"{s3}/a/", f"{s3}/b/1.tar"]


# --------------------------------------------------------------------------------------------------------------------
# What must not be dropped without a word, and what must not take all memory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in range(3):
        (tmp_path / f"0000{number}.tar").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", ["*.tar", "{folder}/*.tar", "0000?.tar", "**/*.tar", "0000[0-9].tar"])
def test_a_dangling_link_that_matches_is_named(folder: Path, pattern: str) -> None:
    (folder / "00003.tar").symlink_to("/nonexistent/blob")
    with pytest.raises(SourceError, match=r"1 of what matches cannot be read: .*00003\.tar \(a link to /nonexistent"):
        expand(pattern.format(folder=folder))


def test_a_pipe_that_matches_is_named_and_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "00003.tar")
    with pytest.raises(SourceError, match="a pipe"):
        expand("*.tar")
    with pytest.raises(SourceError, match="a pipe"):
        expand("00003.tar")


def test_a_folder_that_may_not_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test may run as root, who may list everything, so scandir refuses in its place."""
    (folder / "private").mkdir()
    listed = os.scandir

    def scandir(path: str) -> Any:
        if "private" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for pattern in ("*/*.tar", "**/*.tar", "private/*.tar"):
        with pytest.raises(SourceError, match=r"private/ cannot be listed \(Permission denied\)"):
            expand(pattern)


def test_what_globs_of_the_standard_library_match_is_matched(folder: Path) -> None:
    for name in (".hidden/1.tar", "a/1.tar", "a/b/2.tar", "a/.x.tar", "c.tar/3.tar", "é/ü.tar", "a/b/[x].tar"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (folder / "link").symlink_to("a")
    patterns = ("*", "*.tar", "*/*.tar", "a/**/*.tar", "**/2.tar", ".*/*.tar", "a/*", "[!0]*/*.tar", "*/*/*.tar", "é/*",
                "a/b/[[]x].tar", "./*.tar", "a/../*.tar", "a//*.tar", "link/*.tar")  # fmt: skip
    for pattern in patterns:
        expected = {os.path.realpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
        assert {os.path.realpath(name) for name in names(pattern)} == expected, pattern


def test_a_link_to_a_folder_above_is_no_endless_way(folder: Path) -> None:
    (folder / "up").symlink_to(folder)
    assert {os.path.basename(name) for name in names("**/*.tar")} == {"00000.tar", "00001.tar", "00002.tar"}


@pytest.mark.parametrize("name", ["br[1]ackets/0.tar", "what?/0.tar", "st*r/0.tar"])
def test_a_name_that_is_there_is_meant_as_it_is(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir()
    (folder / name).write_bytes(b"x")
    assert names(name) == [name]
    assert names(name.replace("0.tar", "*.tar")) == [name]
    assert names(str(folder / name)) == [str(folder / name)]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("pipe:cat x.tar", "commands .* are not run"),
        ("a.tar::b.tar", r"\{a.tar,b.tar\}"),
        ("00000.tar,00001.tar", r"written as one, \{a.tar,b.tar\}"),
        ("[0].tar", r"\[\[\]"),
        ("x[b-a]/*.tar", r"\[\.\.\] lists characters"),
        ("http://host/x.tar", "not supported"),
        ("s3://*/x.tar", "bucket is written out"),
    ],
)
def test_notations_of_other_programs_are_told_apart_from_missing_files(folder: Path, pattern: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        expand(pattern)


@pytest.mark.parametrize("pattern", ["s3://bucket/a//0.tar", "s3://bucket//a/0.tar"])
def test_a_key_with_two_slashes_is_refused_and_not_another_key_asked_for(s3: str, pattern: str) -> None:
    with pytest.raises(UserError, match="two slashes in a key"):
        expand(pattern.replace("s3://bucket", s3))


@pytest.mark.parametrize(
    "pattern",
    [
        "{1..1000000000}.tar",
        "{00000000000..99999999999}.tar",
        "{1..1000000000..2}{a,b}",
        "{a,b}" * 24,
        "{" * 40 + "a,b" + "}" * 40,
        "{{a,b}{a,b}{a,b}{a,b},{1..500000}}{1..500000}",
        "x" * 100_000 + "{a,b}",
        "{1..-1000000000}",
        "{1..999999999999999999999999}",
    ],
)
def test_braces_that_name_too_many_are_refused_before_they_are_expanded(pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError):
        expand(pattern)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "pattern",
    ["{00000..00009}", "{a,b}{1..3}", "x{a,{b,c}y{1..2}}z", "{a}", "{1..9..3}", "{c..a}", "{,x}", "{{a,b}}", "{5..1}"],
)
def test_the_count_of_names_is_that_of_their_expansion(pattern: str) -> None:
    assert braces._count(pattern, 0) == len(braces.expand_braces(pattern))
