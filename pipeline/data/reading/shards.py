"""Whole verified shards, for what reads them one after the other: verify, reference and evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.index import Index
from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import Manifest, ShardEntry
from pipeline.data.format.members import require_array
from pipeline.data.format.pixels import read_png
from pipeline.data.format.records import Record, unpack
from pipeline.data.joined.binding import Bound
from pipeline.data.joined.columns import ColumnsContract
from pipeline.data.joined.records import AGAIN, key_of, merged, split
from pipeline.data.reading.reader import read_index, read_verified
from pipeline.errors import ShardCorrupt
from pipeline.storage.base import Storage


class Shard:
    """A verified shard in memory. captions: whether its records have one."""

    def __init__(self, tar: bytes, index: Index, *, captions: bool = True) -> None:
        self.view, self.index, self._captions = memoryview(tar), index, captions

    def record(self, row: int, members: Sequence[str] | None = None) -> Record:
        """The record of row `row`; its arrays are views of the shard's bytes. Raises ShardCorrupt."""
        offset, size = int(self.index.offsets[row]), int(self.index.sizes[row])
        return unpack(self.view[offset : offset + size], members, layout=self.index.layout, captions=self._captions)


def fetch_shard(storage: Storage, entry: ShardEntry, contract: Contract | ColumnsContract) -> Shard:
    """Read a shard and its index and compare both with the manifest; once more if they differ (a read can go wrong).
    contract: of the cache, or of the columns.

    Raises ShardCorrupt when they still differ, and StorageError or NotFound when they cannot be read.
    """
    index = read_index(storage, entry)
    size = storage.stat(entry.name).size
    if size != entry.bytes:
        raise ShardCorrupt(
            f"{storage.locate(entry.name)} has {size} bytes, the manifest says {entry.bytes}: restore it, or delete it "
            f"and run the same `latentmill {entry.VERB}` again"
        )
    tar = read_verified(storage, entry.name, entry.sha256, entry.VERB)
    return Shard(tar, index, captions=contract.text is not None)


def read(
    storage: Storage, manifest: Manifest, shard: int, rows: Sequence[int], members: Sequence[str] | None = None
) -> list[Record]:
    """The records of rows `rows` of shard number `shard`, from the whole verified shard; pixels as arrays (3, H, W).
    Columns of the manifest are part of them."""
    entry = manifest.shards[shard]
    own, theirs = split(members or (), manifest.columns)
    verified_shard = fetch_shard(storage, entry, manifest.own.contract)
    with _located(storage, entry):
        records = [verified_shard.record(row, None if members is None else own) for row in rows]
    for bound, names in zip(manifest.columns, theirs, strict=True):
        if members is None or names or bound.has_text:
            beside = _beside(bound, shard, rows, records, None if members is None else names)
            records = [merged(*both, text=bound.has_text) for both in zip(records, beside, strict=True)]
    with _located(storage, entry):
        for record in records:
            for name in record.members if members is None else members:
                array = record.members[name]
                require_array(name, array.dtype.name, array.shape, manifest.contract, entry.size)
            if manifest.contract.pixels == "png" and "pixels" in record.members:
                record.members["pixels"] = image_of(record, manifest.contract, entry.size)
    return records


@contextmanager
def _located(storage: Storage, entry: ShardEntry) -> Iterator[None]:
    """Has the message of a ShardCorrupt begin with the tar."""
    try:
        yield
    except ShardCorrupt as error:
        raise ShardCorrupt(f"{storage.locate(entry.name)}: {error}") from None


def _beside(
    bound: Bound, shard: int, rows: Sequence[int], records: Sequence[Record], members: Sequence[str] | None
) -> list[Record]:
    """The records of columns that belong to these records of a cache. Raises ShardCorrupt when they have other keys."""
    entry = bound.columns.shards[shard]
    tar = fetch_shard(bound.storage, entry, bound.columns.contract)
    with _located(bound.storage, entry):
        found = [tar.record(row, members) for row in rows]
        for row, one, record in zip(rows, found, records, strict=True):
            if one.key != (wanted := key_of(bound, record.key, shard, row)):
                raise ShardCorrupt(f"row {row} is {one.key}, and the cache's is {wanted}: {AGAIN}")
    return found


def image_of(record: Record, contract: Contract, size: tuple[int, int]) -> np.ndarray:
    """The array that a record holds of its image; of a PNG its pixels (3, H, W) uint8. size: (width, height) of its
    crop. Raises ShardCorrupt."""
    array = record.members[contract.stored]
    if contract.pixels != "png":
        return array
    try:
        return read_png(array, size)
    except ShardCorrupt as error:
        raise ShardCorrupt(f"record {record.key}: {error}") from None


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
