"""patterns.py: which objects a pattern names, and how large they are, on a disk and on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import SourceError
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
