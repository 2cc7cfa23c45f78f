"""What a run reads: one cache, or several mixed, whose shards and blocks are numbered one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.contract import Contract
from pipeline.data.format.kept import Kept
from pipeline.data.format.manifest import Manifest, ShardEntry, load_excluded
from pipeline.data.order.blocks import BLOCK_BYTES, Blocks, Stretch
from pipeline.data.order.mixture import AnyOrder, Mixture, own_seed, suitable_slots, whole_weights
from pipeline.errors import ConfigError
from pipeline.storage.base import Storage


@dataclass(frozen=True)
class Part:
    """One cache."""

    storage: Storage
    manifest: Manifest
    blocks: Blocks

    @property
    def records(self) -> int:
        return int(self.blocks.counts.sum())


class Dataset:
    """One cache or several. As Blocks for all of them together: shards, counts, bytes: (K,) int64 of each block."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.block_starts = np.cumsum([0, *(len(part.blocks) for part in parts)])
        """(D + 1,) number of each cache's first block."""
        self.shard_starts = np.cumsum([0, *(len(part.manifest.shards) for part in parts)])
        """(D + 1,) number of each cache's first shard."""
        offsets = self.shard_starts.tolist()
        self.shards = np.concatenate([part.blocks.shards + offset for part, offset in zip(parts, offsets)])
        self.counts = np.concatenate([part.blocks.counts for part in parts])
        self.bytes = np.concatenate([part.blocks.bytes for part in parts])

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Stretch:
        part, own = self._part(self.block_starts, number)
        stretch = self.parts[part].blocks[own]
        return Stretch(stretch.shard + int(self.shard_starts[part]), stretch.first, stretch.count, stretch.bytes)

    @property
    def contract(self) -> Contract:
        """The contract of the first, which the others share in what a trainer asks of it."""
        return self.parts[0].manifest.contract

    @property
    def url(self) -> str:
        """Where it lies, for messages."""
        return " and ".join(part.storage.url for part in self.parts)

    @property
    def labels(self) -> list[str]:
        """A short name for each cache: the last part of its URL, or all of it where two would be called alike."""
        urls = [part.storage.url.rstrip("/") for part in self.parts]
        short = [url.rpartition("/")[2] for url in urls]
        return short if len(set(short)) == len(short) else urls

    def rows(self, number: int) -> np.ndarray:
        """(count,) rows of a block's records in their tar, int64, ascending."""
        part, own = self._part(self.block_starts, number)
        return self.parts[part].blocks.rows(own)

    def records_at(self, block: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) block numbers and places in them -> (N,) shard numbers and rows of their tars."""
        shards, rows = np.empty_like(block), np.empty_like(block)
        of = self.part_of(block)
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(of == number)
            own, rows[here] = part.blocks.records_at(block[here] - self.block_starts[number], place[here])
            shards[here] = own + self.shard_starts[number]
        return shards, rows

    def part_of(self, block: np.ndarray) -> np.ndarray:
        """(N,) block numbers -> (N,) numbers of the caches that they are of."""
        return np.searchsorted(self.block_starts, block, side="right") - 1

    def shard(self, number: int) -> tuple[Storage, ShardEntry]:
        """Where a shard lies, and what its manifest says of it."""
        part, own = self._part(self.shard_starts, number)
        return self.parts[part].storage, self.parts[part].manifest.shards[own]

    def shard_name(self, number: int) -> str:
        """A shard's tar, for people; of a mixture with its cache's label."""
        part, own = self._part(self.shard_starts, number)
        name = self.parts[part].manifest.shards[own].name
        return name if len(self.parts) == 1 else f"{self.labels[part]}/{name}"

    def whole_weights(self, weights: Sequence[float] = ()) -> tuple[int, ...]:
        """The mixture in integers: shares of samples of each cache; () of one cache. weights: as many as caches, or
        none for shares in proportion to their records."""
        if len(self.parts) == 1:
            return ()
        return whole_weights(weights or [part.records for part in self.parts])

    def order(self, seed: int, batch: int, tail: str = "drop", weights: Sequence[float] = ()) -> AnyOrder:
        """The order of their records. Raises ConfigError, which names the cache that is too small."""
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
                orders.append(part.blocks.order(own_seed(seed, number), slots * item, tail, lanes=lanes))
            except ConfigError as error:
                raise ConfigError(
                    f"{part.storage.url} cannot be mixed in, for its batches are its own, as sizes of latents differ: "
                    f"{error}, or leave it out of data.mix"
                ) from None
        return Mixture(orders, counts, self.whole_weights(weights), seed, batch, slots=slots, item=item)

    def _of_one_size(self) -> bool:
        """Whether records of all caches can stand in one batch."""
        sizes = {size for part in self.parts for size in part.blocks.sizes}
        return len(sizes) == 1 and len({part.manifest.contract.latent_shape for part in self.parts}) == 1

    @staticmethod
    def _part(starts: np.ndarray, number: int) -> tuple[int, int]:
        part = int(np.searchsorted(starts, number, side="right")) - 1
        return part, number - int(starts[part])


def part_of(storage: Storage, manifest: Manifest, block_bytes: int = BLOCK_BYTES) -> Part:
    """The cache at `storage`, without its excluded records. Raises DatasetError."""
    return Part(storage, manifest, Blocks(manifest, Kept(manifest, load_excluded(storage, manifest)), block_bytes))


def dataset_of(storage: Storage, manifest: Manifest, block_bytes: int = BLOCK_BYTES) -> Dataset:
    """The cache at `storage` alone. Raises DatasetError."""
    return Dataset([part_of(storage, manifest, block_bytes)])
