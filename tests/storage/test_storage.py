"""pipeline/storage: the same promises on a local disk, on a real S3 server and on what stands in for Google's store."""

from __future__ import annotations

import errno
import http.server
import os
import socket
import tempfile
import threading
import tracemalloc
import zlib
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.errors import ConfigError, NotFound, StorageError
from pipeline.storage import local as module
from pipeline.storage import s3 as s3_module
from pipeline.storage.base import TEMPORARY, Storage
from pipeline.storage.local import LocalStorage
from pipeline.storage.s3 import S3Storage
from pipeline.storage.stores import Store
from pipeline.storage.urls import open_storage, split_url


@pytest.fixture(params=["local", "s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind, with a prefix."""
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue(request.param)
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
    first_etag = store.stat("key").etag
    store.put("key", b"two!")
    assert store.get("key") == b"two!"
    assert store.stat("key").etag != first_etag


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
    client, store = s3_module.s3_client(), S3Storage(s3.removeprefix("s3://"))
    whole = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **request: whole(**request, MaxKeys=10), raising=False)
    keys = [f"{i:03d}" for i in range(25)]
    for key in keys:
        store.put(key, b"x")
    assert [info.key for info in store.list()] == keys


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a part: the least that S3 takes."""
    monkeypatch.setattr(s3_module, "MULTIPART_BYTES", 5 * 1024 * 1024)
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 * 1024 * 1024)
    return 5 * 1024 * 1024


@pytest.mark.parametrize("extra", [1, 5 * 1024 * 1024])
def test_a_large_object_goes_up_in_parts_and_comes_back_whole(s3: str, small_parts: int, extra: int) -> None:
    data = os.urandom(2 * small_parts + extra)
    store = open_storage(s3)
    store.put("large", data)
    assert store.stat("large").etag.endswith("-3")
    assert store.get("large") == data


def staged(store: Storage, data: bytes) -> Path:
    path = store.staging_path()
    path.write_bytes(data)
    return path


def test_a_file_is_put_whole_over_what_is_there_and_consumed(store: Storage) -> None:
    data = os.urandom(300_000)
    store.put("a/b.tar", b"before")
    path = staged(store, data)
    assert [info.key for info in store.list()] == ["a/b.tar"]
    store.put_file("a/b.tar", path)
    assert store.get("a/b.tar") == data
    assert not path.exists()
    assert [info.key for info in store.list()] == ["a/b.tar"]
    store.put_file("new/empty", staged(store, b""))
    assert store.get("new/empty") == b""


def test_a_file_that_is_not_there_is_not_found(store: Storage, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent"):
        store.put_file("key", tmp_path / "absent.tar")
    assert not store.exists("key")


def test_staging_paths_are_new_and_never_listed(store: Storage) -> None:
    paths = [store.staging_path() for _ in range(3)]
    assert len(set(paths)) == 3
    for path in paths:
        assert not path.exists() and path.parent.is_dir()
        assert TEMPORARY.fullmatch(path.name)
        path.write_bytes(b"half")
    assert store.list() == []
    for path in paths:
        path.unlink()


def test_staging_for_s3_lies_in_the_temporary_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert open_storage("s3://bucket/x").staging_path().parent == tmp_path


def test_a_file_on_the_same_file_system_is_moved_and_not_copied(tmp_path: Path) -> None:
    store = LocalStorage(tmp_path / "root")
    path = staged(store, b"data")
    inode = path.stat().st_ino
    store.put_file("a/b", path)
    assert (tmp_path / "root/a/b").stat().st_ino == inode
    store.put_file("a/b", tmp_path / "root/a/b")
    assert store.get("a/b") == b"data"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which nothing can be renamed, as if it lay on another disk."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    replace = os.replace

    def replace_within(source: Path, target: Path) -> None:
        if Path(source).parent == folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_within)
    return folder


def test_a_file_from_another_disk_is_copied_and_removed(tmp_path: Path, elsewhere: Path) -> None:
    store, data = LocalStorage(tmp_path / "root"), os.urandom(100_000)
    (elsewhere / "file").write_bytes(data)
    store.put_file("a/b", elsewhere / "file")
    assert store.get("a/b") == data
    assert not (elsewhere / "file").exists()
    assert [path.name for path in (tmp_path / "root/a").iterdir()] == ["b"]


def test_a_disk_that_fills_while_a_file_is_copied_keeps_the_old_object_and_the_file(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStorage(tmp_path / "root")
    store.put("key", b"old")
    (elsewhere / "file").write_bytes(b"new" * 1000)

    def full(source: Any, target: Any, length: int) -> None:
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    with pytest.raises(StorageError, match=r"the disk is full: cannot write .*root/key\. Free some space"):
        store.put_file("key", elsewhere / "file")
    assert store.get("key") == b"old"
    assert (elsewhere / "file").read_bytes() == b"new" * 1000
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["key"]


def test_a_file_is_never_held_in_memory_whole(
    store: Storage, elsewhere: Path, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On S3 as few parts as are on their way at once, on another disk a few megabytes."""
    monkeypatch.setattr(s3_module, "PART_THREADS", 1)
    monkeypatch.setattr(module, "COPY_BYTES", 1024 * 1024)
    path = elsewhere / "file"
    with path.open("wb") as file:
        for _ in range(10):
            file.write(os.urandom(small_parts))
    tracemalloc.start()
    try:
        store.put_file("large", path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.stat("large").size == 10 * small_parts
    assert peak < 4 * small_parts


def test_wrong_credentials_are_one_clear_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3_module._clients.clear()
    with pytest.raises(StorageError, match="credentials"):
        open_storage(s3).get("key")


def test_no_credentials_are_one_clear_error(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    s3_module._clients.clear()
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
    temporary = module._write_temporary(tmp_path / "shard.tar", lambda file: file.write(b"half"))
    assert temporary.exists()
    assert store.list() == []


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
    """An object whose body breaks off after some thousand bytes, over and over; `ranges` records what was asked. Like
    Amazon's, and no other store's, its whole answers have a checksum; the first `flips` of them have a flipped byte."""

    data = bytes(i * 7 % 251 for i in range(20_000))
    ranges: ClassVar[list[str]] = []
    step = 3000
    flips = 0

    def do_GET(self) -> None:
        byte_range = self.headers.get("Range", "bytes=0-")
        self.ranges.append(byte_range)
        start, _, end = byte_range.removeprefix("bytes=").partition("-")
        body = self.data[int(start) : int(end) + 1 if end else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        if body == self.data:
            self.send_header("x-amz-checksum-crc32", b64encode(zlib.crc32(body).to_bytes(4, "big")).decode())
        if self.flips:
            type(self).flips -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        self.end_headers()
        self.wfile.write(body[: self.step])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def cut_bodies(_aws: pytest.MonkeyPatch) -> Iterator[type[_CutBodies]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _CutBodies)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    _aws.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    _aws.setenv("AWS_ACCESS_KEY_ID", "key")
    _aws.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    _CutBodies.ranges, _CutBodies.step, _CutBodies.flips = [], 3000, 0
    yield _CutBodies
    server.shutdown()
    server.server_close()


def test_a_body_that_breaks_off_is_resumed_where_it_broke(cut_bodies: type[_CutBodies]) -> None:
    assert open_storage("s3://bucket").get("key") == cut_bodies.data
    assert cut_bodies.ranges == ["bytes=0-", *(f"bytes={start}-" for start in range(3000, 20_000, 3000))]


def test_a_range_that_breaks_off_is_resumed_within_it(cut_bodies: type[_CutBodies]) -> None:
    assert open_storage("s3://bucket").get_range("key", 1000, 5000) == cut_bodies.data[1000:6000]
    assert cut_bodies.ranges == ["bytes=1000-5999", "bytes=4000-5999"]


def test_a_body_whose_checksum_does_not_match_is_read_again(
    cut_bodies: type[_CutBodies], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "reached_at", lambda _: "")  # as if it were Amazon's
    cut_bodies.step, cut_bodies.flips = len(cut_bodies.data), 2
    assert open_storage("s3://bucket").get("key") == cut_bodies.data
    assert cut_bodies.ranges == ["bytes=0-"] * 3


def test_a_body_that_never_comes_is_given_up(cut_bodies: type[_CutBodies], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.patience.PATIENCE_SECONDS", 0.5)
    cut_bodies.step = 0
    with pytest.raises(StorageError, match=r"bucket/key: the body broke off, tried \d+ times in"):
        open_storage("s3://bucket").get("key")


# --------------------------------------------------------------------------------------------------------------------
# URLs


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


@pytest.mark.parametrize("url", ["ftp://b/x", "", "s3://", "https://example.com/x.tar"])
def test_open_storage_refuses_what_it_cannot_reach(url: str) -> None:
    with pytest.raises(ConfigError):
        open_storage(url)


def test_what_killed_writers_left_is_swept_once_it_is_old(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "c")
    old, new = storage.staging_path(), storage.staging_path()
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    storage.put("kept", b"whole")
    os.utime(tmp_path / "c/kept", (1, 1))
    storage.sweep(3600)
    assert (old.exists(), new.exists()) == (False, True)
    assert storage.get("kept") == b"whole"


# --------------------------------------------------------------------------------------------------------------------
# What is no file


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "socket"])
def test_what_has_no_end_is_refused_at_once_and_never_listed(tmp_path: Path, kind: str) -> None:
    store, path = LocalStorage(tmp_path), tmp_path / "manifest.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "link")
        (tmp_path / "link").symlink_to("/dev/zero")
    for read in (store.get, lambda key: store.get_range(key, 0, 10)):
        with pytest.raises(StorageError, match=r"manifest\.json"):
            read("manifest.json")
    assert store.list() == []
    assert not store.exists("manifest.json")


def test_a_file_that_its_owner_removes_while_it_is_looked_at_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of encode take and release one claim by turns."""
    storage, looked = LocalStorage(tmp_path), os.lstat
    storage.put("claim", b"another's")

    def removed_after_the_look(path: Any, **options: Any) -> os.stat_result:
        status = looked(path, **options)
        if Path(path).name == "claim":
            os.unlink(path)
        return status

    monkeypatch.setattr(os, "lstat", removed_after_the_look)
    assert not storage.put_if_absent("claim", b"mine")
    monkeypatch.undo()
    assert storage.put_if_absent("claim", b"mine")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
def test_what_is_no_file_is_no_object_that_exists_already(tmp_path: Path, kind: str) -> None:
    """Who is told that an object exists reads it next, and would be told that there is none, for ever."""
    path = tmp_path / "key"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nothing")
    with pytest.raises(StorageError, match="where a file is to be"):
        LocalStorage(tmp_path).put_if_absent("key", b"x")


def test_a_name_that_is_no_text_is_no_object(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/\xff.tar")).write_bytes(b"x")
    assert LocalStorage(tmp_path).list() == []
