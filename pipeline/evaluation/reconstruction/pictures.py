"""The pictures that an evaluation of an autoencoder reconstructs: the first of a cache that holds pixels.

They are read anew for each evaluation, one shard in memory at a time. Batches are cut within a shard, so that all of a
batch have one size, and they do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.reading.shards import read
from pipeline.errors import ContractMismatch, DatasetError
from pipeline.storage.base import Storage
from pipeline.storage.urls import open_storage

MEMBER = "pixels"


@dataclass(frozen=True)
class Cut:
    """Where a batch lies. first: number of its first picture. rows: of the shard's tar."""

    first: int
    shard: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """numbers: of the pictures, from 0. keys: of their records. pictures: (B, H, W, 3) uint8."""

    numbers: list[int]
    keys: list[str]
    pictures: np.ndarray


class Pictures:
    """The pictures of the cache at `storage`, those that it excludes aside.

    key: names the cache in messages, such as data.val=CACHE. Raises ContractMismatch where it holds no pixels,
    DatasetError where it has no records.
    """

    def __init__(self, storage: Storage, manifest: Manifest, key: str) -> None:
        self.storage, self.manifest, self.key = storage, manifest, key
        contract = manifest.contract
        if not (contract.stored == MEMBER or contract.conditions.pixels):
            raise ContractMismatch(
                f"{key} holds latents and no pictures to compare with: give a cache of encode stored=pixels or "
                "conditions=[pixels]"
            )
        self._kept = KeptRecords(manifest, load_excluded(storage, manifest))
        if not len(self):
            raise DatasetError(f"{key} has no records to evaluate on")

    @classmethod
    def at(cls, url: str, key: str) -> Pictures:
        """Those of the cache at a path or URL. Raises DatasetError, StorageError, ContractMismatch."""
        storage = open_storage(url)
        return cls(storage, load_manifest(storage), f"{key}={url}")

    def __len__(self) -> int:
        return sum(self._kept.sizes)

    @property
    def contract(self) -> Contract:
        return self.manifest.contract

    @property
    def smallest(self) -> int:
        """The smaller side in pixels of its smallest pictures."""
        return min(map(min, self.contract.buckets))

    def require_sizes(self, downsampling: int) -> None:
        """Raise ContractMismatch for pictures that an autoencoder of this f cannot take."""
        for width, height in self.contract.buckets:
            if width % downsampling or height % downsampling:
                raise ContractMismatch(
                    f"{self.key} has pictures of {width} x {height} pixels, and the autoencoder takes multiples of "
                    f"{downsampling}: encode them with such a resolution"
                )

    def cuts(self, images: int, size: int) -> list[Cut]:
        """The batches, of `size` at most, of the first `images` pictures."""
        found: list[Cut] = []
        first = 0
        for shard, kept in enumerate(self._kept.sizes):
            for start in range(0, min(kept, images - first), size):
                ordinals = np.arange(start, min(start + size, kept, images - first))
                rows = self._kept.rows(np.full_like(ordinals, shard), ordinals)
                found.append(Cut(first + start, shard, tuple(rows.tolist())))
            first += min(kept, images - first)
        return found

    def read(self, cuts: list[Cut]) -> Iterator[Batch]:
        """The batches of `cuts`, which are in order. Raises ShardCorrupt, StorageError."""
        for shard in dict.fromkeys(cut.shard for cut in cuts):
            own = [cut for cut in cuts if cut.shard == shard]
            rows = [row for cut in own for row in cut.rows]
            records = iter(read(self.storage, self.manifest, shard, rows, (MEMBER,)))
            for cut in own:
                batch = [next(records) for _ in cut.rows]
                pictures = np.stack([record.members[MEMBER].transpose(1, 2, 0) for record in batch])
                numbers = list(range(cut.first, cut.first + len(batch)))
                yield Batch(numbers, [record.key for record in batch], pictures)
