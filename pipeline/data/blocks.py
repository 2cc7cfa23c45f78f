"""What is read at once: blocks, stretches of a shard's records, each verified by the hashes of its records.

A shard's index is read once, compared with the manifest, and kept in a compact form; a block is then one ranged read.
"""

from __future__ import annotations

import collections
import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.buckets import Buckets
from pipeline.data.diskcache import DiskCache
from pipeline.data.kept import Kept
from pipeline.data.manifest import Manifest, ShardEntry
from pipeline.data.order import Order
from pipeline.data.records import Record, unpack
from pipeline.errors import ShardCorrupt, StorageError
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.data.dataset import Dataset

BLOCK_BYTES = 8_000_000  # of a block, about
INDEX_BYTES = 256_000_000  # of indexes kept in memory
DIGEST = 32  # bytes of a SHA-256


@dataclass(frozen=True)
class Stretch:
    """One block: kept records first to first + count - 1 of a shard, about `bytes` long."""

    shard: int
    first: int
    count: int
    bytes: int


class Blocks:
    """The blocks of a dataset, in the order of its shards.

    shards, counts, bytes: (K,) int64 of each block. Which rows a block's records are: see `rows`.
    """

    def __init__(self, manifest: Manifest, kept: Kept, block_bytes: int = BLOCK_BYTES) -> None:
        self._kept = kept
        self._sizes = manifest.contract.buckets
        known = {size: number for number, size in enumerate(self._sizes)}
        self._buckets = np.array([known[entry.size] for entry in manifest.shards], dtype=np.int64)
        sizes = np.array(kept.sizes, dtype=np.int64)
        whole = np.array([entry.bytes for entry in manifest.shards], dtype=np.int64)
        pieces = np.minimum(-(-whole // block_bytes), sizes)  # no block of a shard without records
        self.shards = np.repeat(np.arange(len(sizes)), pieces)
        piece = np.arange(len(self.shards)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        size, parts = sizes[self.shards], pieces[self.shards]
        self._firsts = piece * size // np.maximum(parts, 1)
        self.counts = (piece + 1) * size // np.maximum(parts, 1) - self._firsts
        self.bytes = -(-whole[self.shards] * self.counts // np.maximum(size, 1))

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Stretch:
        return Stretch(*(int(column[number]) for column in (self.shards, self._firsts, self.counts, self.bytes)))

    def rows(self, number: int) -> np.ndarray:
        """(count,) rows of a block's records in their tar, int64, ascending."""
        stretch = self[number]
        ordinals = stretch.first + np.arange(stretch.count)
        return self._kept.rows(np.full(stretch.count, stretch.shard), ordinals)

    def records_at(self, block: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) block numbers and places in them -> (N,) shard numbers and rows of their tars."""
        shards = self.shards[block]
        return shards, self._kept.rows(shards, self._firsts[block] + place)

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """(width, height) in pixels of the crops that there are."""
        return {self._sizes[bucket] for bucket in np.unique(self._buckets[self.shards]).tolist()}

    def order(self, seed: int, batch: int, tail: str = "drop", *, lanes: int = 0) -> Order | Buckets:
        """The order of their records; with buckets, every batch is of one. lanes: 0 for as many as suit. Raises
        ConfigError."""
        buckets = self._buckets[self.shards]
        if len(np.unique(buckets)) > 1:
            return Buckets(self.counts, buckets, seed, batch, tail, block_shards=self.shards, lanes=lanes)
        return Order(self.counts, seed, batch, tail, block_shards=self.shards, lanes=lanes)


class Block:
    """A verified block in memory: its bytes, where its records lie in them, and their layout (records.unpack)."""

    def __init__(
        self, data: bytes, offsets: np.ndarray, sizes: np.ndarray, layout: dict[str, str] | None = None
    ) -> None:
        self._view, self._offsets, self._sizes, self._layout = memoryview(data), offsets, sizes, layout

    def record(self, place: int, members: Sequence[str] | None = None) -> Record:
        """Record number `place` of the block; its arrays are views of the block's bytes."""
        offset = int(self._offsets[place])
        return unpack(self._view[offset : offset + int(self._sizes[place])], members, layout=self._layout)


@dataclass(frozen=True)
class Index:
    """A shard's index: (n,) int64 offsets and sizes of its records, (n, 32) uint8 SHA-256, and their layout."""

    offsets: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    layout: dict[str, str] | None = None

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.sizes.nbytes + self.digests.nbytes


class Reader:
    """Reads blocks of a dataset; indexes up to INDEX_BYTES are kept in memory, and blocks in `cache`. Safe to call
    from several threads."""

    def __init__(self, dataset: Dataset, cache: DiskCache | None = None) -> None:
        self._dataset, self._cache = dataset, cache
        self._indexes: collections.OrderedDict[int, Future[Index]] = collections.OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def read(self, number: int) -> Block:
        """A block whose every record is what the index says; read once more if it is not (a read can go wrong).

        Raises ShardCorrupt when it still is not, and StorageError or NotFound when it cannot be read.
        """
        stretch, rows = self._dataset[number], self._dataset.rows(number)
        storage, entry = self._dataset.shard(stretch.shard)
        index = self._index(stretch.shard)
        offsets, sizes = index.offsets[rows], index.sizes[rows]
        start, end = int(offsets[0]), int(offsets[-1] + sizes[-1])
        name = f"{entry.sha256[:24]}-{stretch.first}-{stretch.count}"
        cached = self._cache.get(name) if self._cache is not None else None
        if cached is not None and len(cached) == end - start and not _wrong(cached, rows, index, start):
            return Block(cached, offsets - start, sizes)
        problem = ""
        for _ in range(2):
            try:
                data = storage.get_range(entry.name, start, end - start)
            except StorageError as error:
                if storage.stat(entry.name).size >= end:
                    raise
                problem = str(error)
                continue
            wrong = _wrong(data, rows, index, start)
            if not wrong:
                if self._cache is not None:
                    self._cache.put(name, data)
                return Block(data, offsets - start, sizes, index.layout)
            problem = f"the SHA-256 of row {wrong[0]} is another"
        raise ShardCorrupt(
            f"{storage.locate(entry.name)} was read twice and is not what the manifest promises ({problem}): "
            "restore it, or delete it and run the same `latentmill encode` again"
        )

    def _index(self, shard: int) -> Index:
        """A shard's index, read and verified once while it is kept."""
        with self._lock:
            future = self._indexes.get(shard)
            mine = future is None
            if future is None:
                future = self._indexes[shard] = Future()
            self._indexes.move_to_end(shard)
        if mine:
            try:
                index = read_index(*self._dataset.shard(shard))
            except BaseException as error:
                with self._lock:
                    del self._indexes[shard]
                future.set_exception(error)
                raise
            future.set_result(index)
            with self._lock:
                self._held += index.nbytes
                while self._held > INDEX_BYTES and len(self._indexes) > 1:
                    oldest = next(iter(self._indexes))
                    if not self._indexes[oldest].done():
                        break
                    self._held -= self._indexes.pop(oldest).result().nbytes
        return future.result()


def _wrong(data: bytes, rows: np.ndarray, index: Index, start: int) -> list[int]:
    """Rows, of those that `data` should hold from byte `start` of the tar on, whose hash is not the index's."""
    view = memoryview(data)
    return [
        row
        for row, at, size in zip(rows.tolist(), (index.offsets[rows] - start).tolist(), index.sizes[rows].tolist())
        if hashlib.sha256(view[at : at + size]).digest() != index.digests[row].tobytes()
    ]


def read_index(storage: Storage, entry: ShardEntry) -> Index:
    """A shard's index, compared with the manifest. Raises ShardCorrupt."""
    facts = json.loads(read_verified(storage, entry.index_name, entry.index_sha256))
    records = facts["records"]
    digests = np.frombuffer(bytes.fromhex("".join(record[2] for record in records)), dtype=np.uint8)
    return Index(
        np.array([record[0] for record in records], dtype=np.int64),
        np.array([record[1] for record in records], dtype=np.int64),
        digests.reshape(-1, DIGEST),
        facts.get("layout"),
    )


def read_verified(storage: Storage, key: str, sha256: str) -> bytes:
    """A whole object whose hash is the manifest's; read once more if it is not. Raises ShardCorrupt."""
    for _ in range(2):
        data = storage.get(key)
        found = hashlib.sha256(data).hexdigest()
        if found == sha256:
            return data
    raise ShardCorrupt(
        f"{storage.url}/{key} was read twice and is not what the manifest promises (SHA-256 {found[:12]}, not "
        f"{sha256[:12]}): restore it, or delete it and run the same `latentmill encode` again"
    )
