"""pipeline/storage.py: the same promises on a local disk and on a real S3 server."""

from __future__ import annotations

import errno
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline import storage as module
from pipeline.errors import ConfigError, NotFound, SourceError, StorageError
from pipeline.storage import LocalStorage, S3Storage, Storage, expand, open_storage, split_url


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind, with a prefix."""
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    return open_storage(f"{root}/some/prefix")


def test_what_is_put_is_got_whole_and_by_ranges(store: Storage) -> None:
    data = bytes(range(256)) * 5000
    store.put("a/b.tar", data)
    assert store.get("a/b.tar") == data
    assert store.get_range("a/b.tar", 1000, 77) == data[1000:1077]
    assert store.get_range("a/b.tar", 5, 0) == b""
    assert store.stat("a/b.tar").size == len(data)
    store.put("empty", b"")
    assert store.get("empty") == b""


def test_put_replaces_and_changes_the_etag(store: Storage) -> None:
    store.put("key", b"one")
    before = store.stat("key").etag
    store.put("key", b"two!")
    assert store.get("key") == b"two!"
    assert store.stat("key").etag != before


def test_a_range_beyond_the_end_is_an_error(store: Storage) -> None:
    store.put("key", b"0123456789")
    with pytest.raises(StorageError):
        store.get_range("key", 5, 10)
    with pytest.raises(StorageError):
        store.get_range("key", 20, 1)


def test_put_if_absent_keeps_what_is_there(store: Storage) -> None:
    assert store.put_if_absent("key", b"first") is True
    assert store.put_if_absent("key", b"second") is False
    assert store.get("key") == b"first"


def test_absent_objects_are_not_found(store: Storage) -> None:
    for ask in (store.get, store.stat):
        with pytest.raises(NotFound, match="absent"):
            ask("absent")
    with pytest.raises(NotFound):
        store.get_range("absent", 0, 1)
    assert not store.exists("absent")
    store.delete("absent")
    assert store.list("absent") == []


def test_delete_removes_one_object(store: Storage) -> None:
    store.put("a", b"1")
    store.put("b", b"2")
    store.delete("a")
    assert [info.key for info in store.list()] == ["b"]


def test_list_is_recursive_sorted_and_by_string_prefix(store: Storage) -> None:
    for key in ("b/2", "a", "b/1", "b/c/3", "bz"):
        store.put(key, key.encode())
    assert [info.key for info in store.list()] == ["a", "b/1", "b/2", "b/c/3", "bz"]
    assert [info.key for info in store.list("b")] == ["b/1", "b/2", "b/c/3", "bz"]
    assert [info.key for info in store.list("b/")] == ["b/1", "b/2", "b/c/3"]
    assert [info.size for info in store.list("b/c")] == [5]


def test_a_child_is_a_view_of_its_parent(store: Storage) -> None:
    store.child("run/a").put("x", b"1")
    assert store.get("run/a/x") == b"1"
    assert [info.key for info in store.child("run").list()] == ["a/x"]


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "./a", "a\0b"])
def test_keys_cannot_leave_the_storage(key: str, tmp_path: Path) -> None:
    for store in (LocalStorage(tmp_path / "root"), S3Storage("bucket", "prefix")):
        with pytest.raises(StorageError, match="not a key"):
            store.put(key, b"")
        with pytest.raises(StorageError, match="not a key"):
            store.get(key)
    assert list(tmp_path.iterdir()) == []


def test_a_listing_of_more_than_one_page_is_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, store = module.s3_client(), S3Storage(s3.removeprefix("s3://"))
    paginator = client.get_paginator
    monkeypatch.setattr(client, "get_paginator", lambda name: _SmallPages(paginator(name)))
    keys = [f"{i:03d}" for i in range(25)]
    for key in keys:
        store.put(key, b"x")
    assert [info.key for info in store.list()] == keys


class _SmallPages:
    def __init__(self, paginator: Any) -> None:
        self.paginator = paginator

    def paginate(self, **request: Any) -> Any:
        return self.paginator.paginate(**request, PaginationConfig={"PageSize": 10})


def test_a_large_object_goes_up_in_parts_and_comes_back_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MULTIPART_BYTES", 1024 * 1024)
    data = os.urandom(11 * 1024 * 1024)
    store = open_storage(s3)
    store.put("large", data)
    assert store.get("large") == data


def test_wrong_credentials_are_one_clear_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    module._clients.clear()
    with pytest.raises(StorageError, match="credentials"):
        open_storage(s3).get("key")


def test_no_credentials_are_one_clear_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    module._clients.clear()
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        open_storage(s3).get("key")


def test_a_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(NotFound, match="no-such-bucket"):
        open_storage("s3://no-such-bucket/x").put("key", b"")


# --------------------------------------------------------------------------------------------------------------------
# Faults


def test_a_local_write_that_fails_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStorage(tmp_path)
    store.put("key", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=r"disk is full.*other"):
            write("other", b"new")
    with pytest.raises(StorageError, match=r"disk is full.*key"):
        store.put("key", b"new")
    assert store.get("key") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_unfinished_local_writes_are_never_listed(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path)
    temporary = module._write_temporary(tmp_path / "shard.tar", b"half")
    assert temporary.exists()
    assert store.list() == []
    with pytest.raises(SourceError):
        expand(f"{tmp_path}/.*.tmp")


def test_racing_local_puts_have_one_winner(tmp_path: Path) -> None:
    store, won = LocalStorage(tmp_path), []

    def race(number: int) -> None:
        won.append(store.put_if_absent("key", str(number).encode()))

    threads = [threading.Thread(target=race, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 15 + [True]


class _CutBodies(http.server.BaseHTTPRequestHandler):
    """An object whose body breaks off after some thousand bytes, over and over; `ranges` records what was asked."""

    data = bytes(i * 7 % 251 for i in range(20_000))
    ranges: ClassVar[list[str]] = []
    step = 3000

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "bytes=0-")
        self.ranges.append(asked)
        start, _, end = asked.removeprefix("bytes=").partition("-")
        body = self.data[int(start) : int(end) + 1 if end else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.end_headers()
        self.wfile.write(body[: self.step])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def cut_bodies(_aws: pytest.MonkeyPatch) -> Iterator[type[_CutBodies]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _CutBodies)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _aws.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    _aws.setenv("AWS_ACCESS_KEY_ID", "key")
    _aws.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    _aws.setattr(module.time, "sleep", lambda _: None)
    _CutBodies.ranges, _CutBodies.step = [], 3000
    yield _CutBodies
    server.shutdown()
    server.server_close()


def test_a_body_that_breaks_off_is_resumed_where_it_broke(cut_bodies: type[_CutBodies]) -> None:
    assert open_storage("s3://bucket").get("key") == cut_bodies.data
    assert cut_bodies.ranges == ["bytes=0-", *(f"bytes={start}-" for start in range(3000, 20_000, 3000))]


def test_a_range_that_breaks_off_is_resumed_within_it(cut_bodies: type[_CutBodies]) -> None:
    assert open_storage("s3://bucket").get_range("key", 1000, 5000) == cut_bodies.data[1000:6000]
    assert cut_bodies.ranges == ["bytes=1000-5999", "bytes=4000-5999"]


def test_a_body_that_never_comes_is_given_up(cut_bodies: type[_CutBodies]) -> None:
    cut_bodies.step = 0
    with pytest.raises(StorageError, match=r"bucket/key: the body broke off \d+ times"):
        open_storage("s3://bucket").get("key")


# --------------------------------------------------------------------------------------------------------------------
# URLs and patterns


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://b/a/x.tar", ("s3://b/a", "x.tar")),
        ("s3://b/x.tar", ("s3://b", "x.tar")),
        ("a/b.tar", ("a", "b.tar")),
        ("b.tar", (".", "b.tar")),
        ("/b.tar", ("/", "b.tar")),
    ],
)
def test_split_url(url: str, parts: tuple[str, str]) -> None:
    assert split_url(url) == parts


@pytest.mark.parametrize("url", ["s3://bucket", "a/", ""])
def test_split_url_refuses_what_names_no_object(url: str) -> None:
    with pytest.raises(ConfigError):
        split_url(url)


@pytest.mark.parametrize("url", ["gs://b/x", "", "s3://", "https://example.com/x.tar"])
def test_open_storage_refuses_what_it_cannot_reach(url: str) -> None:
    with pytest.raises(ConfigError):
        open_storage(url)


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
