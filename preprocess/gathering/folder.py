"""A folder of images, local or in a bucket, with texts beside them or in metadata files: listed once, read in units.

A sample's key is the path of its files in the folder without their suffix, so that files of one name in two folders are
two samples. Samples are sorted by their keys. Names that begin with a dot, below the folder itself, are passed over,
as are files of other kinds. Links to files in the folder are followed; those that lead out of it, or to folders, are
refused, for what a link leads to may be anything on the machine.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import LimitsConfig
from pipeline.errors import SourceError
from pipeline.storage.base import Storage
from preprocess.gathering import metadata
from preprocess.gathering.reading import Read, read_local, read_remote
from preprocess.gathering.unit import GatheredUnit, SourceUnit, unit_bytes
from preprocess.source.shard import FOREIGN_FOLDER, IMAGES, Sample, split_name

READERS = {True: 2, False: 16}
"""Threads that read the files of a unit, by whether they are local."""
TASK = {True: 16, False: 1}
"""Samples that such a thread reads at a time."""
TASK_BYTES = 32 * 1024 * 1024  # of files, after which a task takes no further sample
JSON = ".json"


@dataclass(frozen=True)
class File:
    """A file of a folder. name: its path in the folder. path: where it is read, with links followed. size: bytes."""

    name: str
    path: str
    size: int


@dataclass
class Folder:
    """What a folder holds. url: its absolute path, or its s3:// URL without a slash at the end. real: the same with all
    links followed. files: of each sample, in the order of their names, by its key. rows: JSON of the metadata, by the
    key of its sample. passed_over: files that belong to no sample."""

    storage: Storage
    url: str
    real: str
    files: dict[str, list[File]] = field(default_factory=dict)
    rows: dict[str, bytes] = field(default_factory=dict)
    passed_over: int = 0

    @property
    def is_local(self) -> bool:
        return self.storage.local_path("x") is not None

    def keys(self) -> list[str]:
        """Keys of all samples, sorted."""
        return sorted(self.files.keys() | self.rows.keys())

    def members(self, key: str) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of what a sample is read from."""
        for file in self.files.get(key, ()):
            yield file.name, file.size
        if key in self.rows:
            yield key + JSON, len(self.rows[key])

    def bytes_of(self, keys: list[str]) -> int:
        """The size of a unit of these samples."""
        return unit_bytes(member for key in keys for member in self.members(key))


@dataclass(frozen=True)
class FolderContents:
    """The samples of one unit. keys: in order. url: of the unit."""

    folder: Folder
    keys: list[str]
    url: str

    def open(self, limits: LimitsConfig, name: str, stopped: threading.Event | None) -> SourceUnit:
        return FolderUnit(self, limits, name, stopped)


class FolderUnit(GatheredUnit):
    """Some samples of a folder, whose files a few threads read ahead."""

    def __init__(
        self, contents: FolderContents, limits: LimitsConfig, name: str = "", stopped: threading.Event | None = None
    ) -> None:
        folder, keys = contents.folder, contents.keys
        super().__init__(contents.url, name, folder.bytes_of(keys), limits, stopped)
        self._folder, self._keys = folder, keys
        self._pool = ThreadPoolExecutor(READERS[folder.is_local], "latentmill-files")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def samples(self) -> Iterator[Sample]:
        """Yields the samples in order. Raises ShardCorrupt for a file that is gone, or has changed since the folder was
        listed."""
        tasks = self._tasks()
        ahead: list[Future[list[list[Read]]]] = []
        pieces: list[list[str]] = []
        more = True
        while more or ahead:
            self.refuse_stopped()
            while more and len(ahead) <= READERS[self._folder.is_local]:
                keys = next(tasks, [])
                more = bool(keys)
                if keys:
                    pieces.append(keys)
                    ahead.append(self._pool.submit(self._read, keys))
            if ahead:
                for key, contents in zip(pieces.pop(0), ahead.pop(0).result(), strict=True):
                    yield self._sample(key, contents)

    def _tasks(self) -> Iterator[list[str]]:
        """The keys, in groups that are read together."""
        most, keys, size = TASK[self._folder.is_local], list[str](), 0
        for key in self._keys:
            keys.append(key)
            size += sum(file.size for file in self._folder.files.get(key, ()))
            if len(keys) == most or size > TASK_BYTES:
                yield keys
                keys, size = [], 0
        if keys:
            yield keys

    def _read(self, keys: list[str]) -> list[list[Read]]:
        """The contents of the files of each sample, in the order of their names."""
        storage, most = self._folder.storage, self.limits.member_bytes
        read = read_local if self._folder.is_local else read_remote
        return [[read(storage, file.path, file.size, most) for file in self._folder.files.get(key, ())] for key in keys]

    def _sample(self, key: str, contents: list[Read]) -> Sample:
        members: list[tuple[str, bytes | None]] = []
        for file, content in zip(self._folder.files.get(key, ()), contents, strict=True):
            if content.problem:
                raise self.corrupt(
                    f"{file.name} {content.problem}", "Put it back as it was when this was begun, and run this again"
                )
            self.identity.begin(file.name, file.size)
            for part in content.parts():
                self.refuse_stopped()
                self.identity.content(part)
            self._position += unit_bytes([(file.name, file.size)])
            members.append((file.name, content.data))
        row = self._folder.rows.get(key)
        if row is not None:
            self.identity.add(key + JSON, row)
            self._position += unit_bytes([(key + JSON, len(row))])
        sample = self.sample(key, members)
        if row is not None:
            if "json" in sample.members:
                sample.problem = "metadata_repeated"
            sample.members["json"] = row
        return sample


# --------------------------------------------------------------------------------------------------------------------
# Listing


def list_folder(storage: Storage, url: str) -> Folder:
    """Lists a folder once. storage: its files. url: as for Folder. Raises SourceError, which names the first thing that
    is wrong, and StorageError."""
    root = storage.local_path("x")
    real = url if root is None else os.path.realpath(root.parent)
    folder = Folder(storage, url, real)
    tables: list[File] = []
    for file in _local(folder, url) if root is not None else _remote(storage):
        if file.name.rpartition("/")[2].lower() in metadata.NAMES:
            tables.append(file)
            continue
        key, suffix = split_name(file.name)
        if suffix:
            folder.files.setdefault(key, []).append(file)
        else:
            folder.passed_over += 1
    for files in folder.files.values():
        files.sort(key=lambda file: file.name)
    for table in sorted(tables, key=lambda file: file.name):
        _add_rows(folder, table)
    images = set(IMAGES)
    if not any(split_name(file.name)[1] in images for files in folder.files.values() for file in files):
        raise SourceError(
            f"{url} is a folder without images (jpg, jpeg, png, webp); name its shards, for example "
            f"'{url.rstrip('/')}/*.tar' or '{url.rstrip('/')}/*.parquet'"
        )
    return folder


def _add_rows(folder: Folder, table: File) -> None:
    """Adds the rows of a metadata file."""
    where = f"{folder.url}/{table.name}"
    if table.size > metadata.MOST_BYTES:
        raise SourceError(f"{where} has {table.size:,} bytes, {metadata.MOST_BYTES:,} at most are read: split it")
    read = read_local if folder.is_local else read_remote
    content = read(folder.storage, table.path, table.size, metadata.MOST_BYTES)
    if content.problem or content.data is None:
        raise SourceError(f"{where} {content.problem}: run this again")
    for name, row in metadata.rows(where, table.name, content.data):
        key = split_name(name)[0]
        if key in folder.rows:
            raise SourceError(f"{where}: {name} has a row of metadata already: leave one of the two out")
        folder.rows[key] = row


def _remote(storage: Storage) -> Iterator[File]:
    for info in storage.list():
        if not _is_hidden(info.key):
            yield File(info.key, info.key, info.size)


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return FOREIGN_FOLDER in parts or any(part.startswith(".") for part in parts)


def _local(folder: Folder, url: str) -> Iterator[File]:
    """All files below a local folder that are not hidden, each with one look at it."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        for entry in _entries(os.path.join(url, prefix)):
            name = prefix + entry.name
            if entry.name.startswith(".") or entry.name == FOREIGN_FOLDER:
                continue
            if entry.is_symlink():
                yield from _followed(folder, name, entry)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(f"{name}/")
            else:
                yield from _file(name, entry.path, entry.stat(follow_symlinks=False))


def _entries(place: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return list(entries)
    except OSError as error:
        raise SourceError(f"{place} cannot be listed ({error.strerror}), and images may lie in it") from None


def _file(name: str, path: str, status: os.stat_result) -> Iterator[File]:
    """A file, unless it is of no sample. Raises SourceError for one of a sample that cannot be read, or named."""
    is_of_sample = bool(split_name(name)[1]) or name.rpartition("/")[2].lower() in metadata.NAMES
    if is_of_sample and not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path} is a pipe, a socket or a device, and not a file: remove it")
    if is_of_sample:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SourceError(f"{path!r}: its name is not UTF-8; rename it") from None
    if stat.S_ISREG(status.st_mode):
        yield File(name, path, status.st_size)


def _followed(folder: Folder, name: str, entry: os.DirEntry[str]) -> Iterator[File]:
    """The file that a link leads to, if that is in the folder."""
    target = os.path.realpath(entry.path)
    inside = target.startswith(f"{folder.real.rstrip('/')}/")
    is_folder = os.path.isdir(target)
    if not is_folder and not split_name(name)[1] and name.rpartition("/")[2].lower() not in metadata.NAMES:
        return
    if is_folder or not inside or not os.path.exists(target):
        what = "a folder" if is_folder else "nothing" if not os.path.exists(target) else f"{target}, out of the folder"
        raise SourceError(
            f"{entry.path} is a link to {what}: refused. Put the files themselves there (cp -rL, or hard links), or "
            "remove it"
        )
    yield from _file(name, target, Path(target).stat())


def class_folders(url: str, storage: Storage) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted: the classes of a tree with a folder for each. Raises SourceError where
    there are none, and StorageError."""
    if storage.local_path("x") is not None:
        names = {entry.name for entry in _entries(url) if entry.is_dir(follow_symlinks=False)}
    else:
        names = {info.key.partition("/")[0] for info in storage.list() if "/" in info.key}
    names = {name for name in names if not _is_hidden(name)}
    if not names:
        raise SourceError(f"{url} holds no folders, and classes.key=folder wants one for each class")
    return tuple(sorted(names))
