"""Whole verified shards, for what reads them one after the other: verify, reference and evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import Manifest, ShardEntry, load_excluded
from pipeline.data.format.records import Record, unpack
from pipeline.data.reading.reader import read_verified
from pipeline.errors import DatasetError
from pipeline.storage.base import Storage


class Shard:
    """A verified shard in memory."""

    def __init__(self, tar: bytes, index: dict[str, object]) -> None:
        self.view = memoryview(tar)
        self.records: list[list[int]] = index["records"]  # type: ignore[assignment]  # [offset, size, sha256]
        self._layout: dict[str, str] | None = index.get("layout")  # type: ignore[assignment]

    def record(self, row: int, members: Sequence[str] | None = None) -> Record:
        """The record of row `row`; its arrays are views of the shard's bytes."""
        offset, size = self.records[row][:2]
        return unpack(self.view[offset : offset + size], members, layout=self._layout)


def fetch_shard(storage: Storage, entry: ShardEntry) -> Shard:
    """Read a shard and its index and compare both with the manifest; once more if they differ (a read can go wrong).

    Raises ShardCorrupt when they still differ, and StorageError or NotFound when they cannot be read.
    """
    index = read_verified(storage, entry.index_name, entry.index_sha256)
    return Shard(read_verified(storage, entry.name, entry.sha256), json.loads(index))


def require_shards(storage: Storage, manifest: Manifest) -> None:
    """Raise DatasetError, which names the first one, when shards or indexes of the manifest are missing, or a shard's
    size differs from the manifest."""
    stored_sizes = {info.key: info.size for info in storage.list("")}
    missing = [name for shard in manifest.shards for name in (shard.name, shard.index_name) if name not in stored_sizes]
    for shard in manifest.shards:
        if stored_sizes.get(shard.name, shard.bytes) != shard.bytes:
            raise DatasetError(
                f"{storage.locate(shard.name)} has {stored_sizes[shard.name]} bytes, its manifest says {shard.bytes}: "
                "restore it, or delete it and run the same `latentmill encode` again"
            )
    if missing:
        raise DatasetError(
            f"{storage.url} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files" if len(missing) > 1 else "")
            + " of its manifest: restore them, or run the same `latentmill encode` again"
        )


def read(
    storage: Storage, manifest: Manifest, shard: int, rows: Sequence[int], members: Sequence[str] | None = None
) -> list[Record]:
    """The records of rows `rows` of shard number `shard`, from the whole verified shard."""
    verified_shard = fetch_shard(storage, manifest.shards[shard])
    return [verified_shard.record(row, members) for row in rows]


def first_records(
    storage: Storage, manifest: Manifest, count: int, members: Sequence[str] | None = None
) -> Iterator[Record]:
    """The first `count` records that are not excluded, in the order of the manifest, or all if there are fewer."""
    kept = KeptRecords(manifest, load_excluded(storage, manifest))
    for number, size in enumerate(kept.sizes):
        if count <= 0:
            return
        ordinals = np.arange(min(size, count))
        if len(ordinals):
            rows = kept.rows(np.full_like(ordinals, number), ordinals)
            yield from read(storage, manifest, number, rows.tolist(), members)
        count -= len(ordinals)
