"""What is read at once: blocks, stretches of a shard's records (read by reader.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.format.kept import Kept
from pipeline.data.format.manifest import Manifest
from pipeline.data.order.buckets import Buckets
from pipeline.data.order.shuffle import Order

BLOCK_BYTES = 8_000_000  # of a block, about


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
