"""Blocks, the units of reading: ranges of consecutive records of a shard (read by reader.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import Manifest
from pipeline.data.order.buckets import Buckets
from pipeline.data.order.shuffle import Order

BLOCK_BYTES = 8_000_000  # approximate size of a block


@dataclass(frozen=True)
class Stretch:
    """One block: kept records first to first + count - 1 of a shard, approximately `bytes` long."""

    shard: int
    first: int
    count: int
    bytes: int


class Blocks:
    """The blocks of a dataset, in the order of its shards.

    shards, counts, bytes: (K,) int64, shard number, number of records and approximate size of each block, that of its
    columns included, which do not change what a block is.
    """

    def __init__(self, manifest: Manifest, kept: KeptRecords, block_bytes: int = BLOCK_BYTES) -> None:
        self._kept = kept
        self._bucket_sizes = manifest.contract.buckets
        bucket_numbers = {size: number for number, size in enumerate(self._bucket_sizes)}
        self._buckets = np.array([bucket_numbers[entry.size] for entry in manifest.shards], dtype=np.int64)
        sizes = np.array(kept.sizes, dtype=np.int64)
        shard_bytes = np.array([entry.bytes for entry in manifest.shards], dtype=np.int64)
        pieces = np.minimum(-(-shard_bytes // block_bytes), sizes)  # a shard without records has no block
        self.shards = np.repeat(np.arange(len(sizes)), pieces)
        piece = np.arange(len(self.shards)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        size, parts = sizes[self.shards], pieces[self.shards]
        self._first_records = piece * size // np.maximum(parts, 1)
        self.counts = (piece + 1) * size // np.maximum(parts, 1) - self._first_records
        for bound in manifest.columns:
            shard_bytes = shard_bytes + np.array([entry.bytes for entry in bound.columns.shards], dtype=np.int64)
        self.bytes = -(-shard_bytes[self.shards] * self.counts // np.maximum(size, 1))

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Stretch:
        return Stretch(*(int(column[number]) for column in (self.shards, self._first_records, self.counts, self.bytes)))

    def rows(self, number: int) -> np.ndarray:
        """(count,) rows of a block's records in their tar, int64, ascending."""
        stretch = self[number]
        ordinals = stretch.first + np.arange(stretch.count)
        return self._kept.rows(np.full(stretch.count, stretch.shard), ordinals)

    def records_at(self, block: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) block numbers and places in them -> (N,) shard numbers and rows of their tars."""
        shards = self.shards[block]
        return shards, self._kept.rows(shards, self._first_records[block] + place)

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """The sizes (width, height) in pixels of all crops."""
        return {self._bucket_sizes[bucket] for bucket in np.unique(self._buckets[self.shards]).tolist()}

    def order(self, seed: int, batch: int, tail: str = "drop", *, lanes: int = 0) -> Order | Buckets:
        """The order of the records; with buckets, each batch is of one bucket. lanes: 0 = a suitable number. Raises
        ConfigError."""
        buckets = self._buckets[self.shards]
        if len(np.unique(buckets)) > 1:
            return Buckets(self.counts, buckets, seed, batch, tail, block_shards=self.shards, lanes=lanes)
        return Order(self.counts, seed, batch, tail, block_shards=self.shards, lanes=lanes)
