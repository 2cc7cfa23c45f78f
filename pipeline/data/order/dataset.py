"""The dataset that a run reads: one cache or a mixture of several, with shards and blocks numbered consecutively."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.contract import Contract, canonical_json
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import Manifest, ShardEntry
from pipeline.data.format.present import require_shards
from pipeline.data.order.blocks import BLOCK_BYTES, Blocks, Stretch
from pipeline.data.order.mixture import AnyOrder, Mixture, dataset_seed, suitable_slots, whole_weights
from pipeline.errors import ConfigError
from pipeline.storage.base import Storage

MOST_UNSEEN_BLOCKS, MOST_UNSEEN_RECORDS = 1 << 20, 1 << 27
"""A manifest that promises more is compared with the store before tables are made for it."""


@dataclass(frozen=True)
class Part:
    """One cache of a dataset."""

    storage: Storage
    manifest: Manifest
    blocks: Blocks

    @property
    def records(self) -> int:
        return int(self.blocks.counts.sum())


class Dataset:
    """One cache or several, like Blocks of all of them together.

    shards, counts, bytes: (K,) int64, shard number, number of records and approximate size of each block.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.block_starts = np.cumsum([0, *(len(part.blocks) for part in parts)])
        """(D + 1,) number of the first block of each cache."""
        self.shard_starts = np.cumsum([0, *(len(part.manifest.shards) for part in parts)])
        """(D + 1,) number of the first shard of each cache."""
        offsets = self.shard_starts.tolist()
        self.shards = np.concatenate([part.blocks.shards + offset for part, offset in zip(parts, offsets)])
        self.counts = np.concatenate([part.blocks.counts for part in parts])
        self.bytes = np.concatenate([part.blocks.bytes for part in parts])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Stretch:
        part, number_in_part = self._part(self.block_starts, number)
        stretch = self.parts[part].blocks[number_in_part]
        return Stretch(stretch.shard + int(self.shard_starts[part]), stretch.first, stretch.count, stretch.bytes)

    @property
    def contract(self) -> Contract:
        """The contract of the first cache; the others share all of it that a trainer depends on."""
        return self.parts[0].manifest.contract

    @property
    def url(self) -> str:
        """The URLs of the caches, for messages."""
        return " and ".join(part.storage.url for part in self.parts)

    @property
    def labels(self) -> list[str]:
        """A short name of each cache: the last component of its URL, or whole URLs if two names would be equal."""
        urls = [part.storage.url.rstrip("/") for part in self.parts]
        names = [url.rpartition("/")[2] for url in urls]
        return names if len(set(names)) == len(names) else urls

    def rows(self, number: int) -> np.ndarray:
        """(count,) rows of a block's records in their tar, int64, ascending."""
        part, number_in_part = self._part(self.block_starts, number)
        return self.parts[part].blocks.rows(number_in_part)

    def records_at(self, block: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) block numbers and places in them -> (N,) shard numbers and rows of their tars."""
        shards, rows = np.empty_like(block), np.empty_like(block)
        part_numbers = self.part_of(block)
        for number, part in enumerate(self.parts):
            chosen = np.flatnonzero(part_numbers == number)
            part_shards, rows[chosen] = part.blocks.records_at(block[chosen] - self.block_starts[number], place[chosen])
            shards[chosen] = part_shards + self.shard_starts[number]
        return shards, rows

    def part_of(self, block: np.ndarray) -> np.ndarray:
        """(N,) block numbers -> (N,) numbers of their caches."""
        return np.searchsorted(self.block_starts, block, side="right") - 1

    def shard(self, number: int) -> tuple[Storage, ShardEntry]:
        """The storage of a shard, and its entry in the manifest."""
        part, number_in_part = self._part(self.shard_starts, number)
        return self.parts[part].storage, self.parts[part].manifest.shards[number_in_part]

    def manifest_of(self, shard: int) -> tuple[Manifest, int]:
        """The manifest of the cache that a shard is of, and the shard's number in it."""
        part, number_in_part = self._part(self.shard_starts, shard)
        return self.parts[part].manifest, number_in_part

    @property
    def columns(self) -> str:
        """Digest of all columns that are read with the caches; "" without any."""
        digests = [[bound.columns.digest for bound in part.manifest.columns] for part in self.parts]
        return hashlib.sha256(canonical_json(digests)).hexdigest() if any(digests) else ""

    def shard_name(self, number: int) -> str:
        """The name of a shard's tar, for people; in a mixture with the label of its cache."""
        part, number_in_part = self._part(self.shard_starts, number)
        name = self.parts[part].manifest.shards[number_in_part].name
        return name if len(self.parts) == 1 else f"{self.labels[part]}/{name}"

    def whole_weights(self, weights: Sequence[float] = ()) -> tuple[int, ...]:
        """The mixture's weights as integers, one per cache; () for one cache. weights: one per cache, or none for
        weights in proportion to the numbers of records."""
        if len(self.parts) == 1:
            return ()
        return whole_weights(weights or [part.records for part in self.parts])

    def order(self, seed: int, batch: int, tail: str = "drop", weights: Sequence[float] = ()) -> AnyOrder:
        """The order of the records. Raises ConfigError, which names a cache that is too small."""
        if len(self.parts) == 1:
            return self.parts[0].blocks.order(seed, batch, tail)
        counts = [len(part.blocks) for part in self.parts]
        for part in self.parts:
            if part.records == 0:
                raise ConfigError(f"{part.storage.url} has no records: leave it out of data.train and data.mix")
        mixes_within = self._of_one_size()
        slots = suitable_slots(batch, counts, [part.records for part in self.parts]) if mixes_within else 1
        item = 1 if mixes_within else batch
        orders = []
        for number, part in enumerate(self.parts):
            lanes = slots if mixes_within else 0
            try:
                orders.append(part.blocks.order(dataset_seed(seed, number), slots * item, tail, lanes=lanes))
            except ConfigError as error:
                raise ConfigError(
                    f"{part.storage.url} cannot be mixed in: latents differ in size, so each batch is of one cache: "
                    f"{error}, or leave it out of data.mix"
                ) from None
        return Mixture(orders, counts, self.whole_weights(weights), seed, batch, slots=slots, item=item)

    def _of_one_size(self) -> bool:
        """Whether records of all caches may be in one batch."""
        sizes = {size for part in self.parts for size in part.blocks.sizes}
        return len(sizes) == 1 and len({part.manifest.contract.latent_shape for part in self.parts}) == 1

    @staticmethod
    def _part(starts: np.ndarray, number: int) -> tuple[int, int]:
        """Number of a block or shard of the dataset -> number of its cache, and its number there."""
        part = int(np.searchsorted(starts, number, side="right")) - 1
        return part, number - int(starts[part])


def part_of(storage: Storage, manifest: Manifest, block_bytes: int = BLOCK_BYTES) -> Part:
    """The cache at `storage` as a part, without its excluded records.

    Where the manifest promises so much that its tables alone would take memory, the tars are looked at first. Raises
    DatasetError.
    """
    blocks = sum(min(-(-entry.bytes // block_bytes), entry.samples) for entry in manifest.shards)
    if blocks > MOST_UNSEEN_BLOCKS or manifest.samples > MOST_UNSEEN_RECORDS:
        require_shards(storage, manifest)
    return Part(
        storage, manifest, Blocks(manifest, KeptRecords(manifest, load_excluded(storage, manifest)), block_bytes)
    )


def dataset_of(storage: Storage, manifest: Manifest, block_bytes: int = BLOCK_BYTES) -> Dataset:
    """A dataset of the one cache at `storage`. Raises DatasetError."""
    return Dataset([part_of(storage, manifest, block_bytes)])
