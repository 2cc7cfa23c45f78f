"""Damages a small cache and makes every hash right again, as somebody would who wants it to be read."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from made.cache import LENGTH, WIDTH, make_cache, record
from made.encode import files
from pipeline.data.format.manifest import load_manifest
from pipeline.data.format.records import npy_bytes, pack, tar_member
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading.stream import Stream
from pipeline.storage.urls import open_storage

Change = Callable[[Any], object]
ZEROS = npy_bytes(np.zeros((LENGTH, WIDTH), dtype=np.float16))


def manifest_json(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_bytes())


def forge_manifest(folder: Path, change: Change) -> None:
    """Changes the manifest's value in place; a change that returns bytes replaces the file."""
    value = manifest_json(folder)
    changed = change(value)
    data = changed if isinstance(changed, bytes) else json.dumps(value).encode()
    (folder / "manifest.json").write_bytes(data)


def forge_index(folder: Path, change: Change) -> None:
    """Changes the first index, and what the manifest says of it."""
    path = folder / "000000.index.json"
    value = json.loads(path.read_bytes())
    changed = change(value)
    data = changed if isinstance(changed, bytes) else json.dumps(value).encode()
    path.write_bytes(data)
    _promise(folder, "shards", 0, index_sha256=hashlib.sha256(data).hexdigest())


def forge_records(folder: Path, records: list[bytes]) -> None:
    """Writes the first tar anew from the bytes of its records, with index and manifest."""
    tar = b"".join(records) + bytes(1024)
    rows, offset = [], 0
    for data in records:
        rows.append([offset, len(data), hashlib.sha256(data).hexdigest()])
        offset += len(data)
    (folder / "000000.tar").write_bytes(tar)
    sha256 = hashlib.sha256(tar).hexdigest()
    _promise(folder, "shards", 0, samples=len(rows), bytes=len(tar), sha256=sha256)
    facts = {"format": 2, "samples": len(rows), "bytes": len(tar), "sha256": sha256, "records": rows}
    forge_index(folder, lambda value: (value.clear(), value.update(facts)))


def members(row: int = 0) -> list[tuple[str, bytes]]:
    """The files of a whole record of the first tar."""
    return pack(record(0, row))


def joined(files: list[tuple[str, bytes]]) -> bytes:
    """The bytes of a record of these files."""
    return b"".join(tar_member(name, data) for name, data in files)


def with_file(suffix: str, data: bytes, row: int = 0) -> bytes:
    """A whole record but for one of its files."""
    return joined([(name, data if name.endswith(suffix) else whole) for name, whole in members(row)])


def with_header(value: bytes, at: int) -> bytes:
    """A record whose first tar header has `value` at byte `at`, with a right checksum."""
    data = bytearray(joined(members()))
    data[at : at + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def forge_uncond(folder: Path, data: bytes) -> None:
    (folder / "uncond.npy").write_bytes(data)
    forge_manifest(folder, lambda value: value.update(uncond_sha256=hashlib.sha256(data).hexdigest()))


def forge_excluded(folder: Path, data: bytes, count: int = 2) -> None:
    (folder / "manifests/000001.excluded.npy").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    forge_manifest(folder, lambda value: value.update(excluded=count, excluded_sha256=sha256))


def _promise(folder: Path, group: str, number: int, **facts: Any) -> None:
    forge_manifest(folder, lambda value: value[group][number].update(facts))


@cache
def _whole() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        make_cache(folder, [5, 3])
        return files(Path(folder))


def small(folder: Path) -> Path:
    """A whole cache of two tars."""
    for name, data in _whole().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def train_on(folder: Path) -> None:
    """Reads one batch as training does."""
    storage = open_storage(str(folder))
    dataset = dataset_of(storage, load_manifest(storage))
    with Stream(dataset, dataset.order(1, 4), batch=4, members=("moments", "text")) as stream:
        batch = next(stream)
        assert len(batch.captions) == 4
