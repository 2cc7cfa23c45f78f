"""Which record is sample number n: pure arithmetic on (seed, n) and the sizes of the dataset's blocks.

A block is a stretch of one shard, small enough to be read at once (blocks.py). Every epoch shuffles the shards, takes
them in groups of `group`, and puts the blocks of a group in random order, so that a reader has few shards open. The
records of that sequence are dealt to `lanes` equal lanes, each a contiguous part of it. A global batch of B takes B /
lanes records from each lane, and lane after lane stands in the batch: ranks, which take consecutive parts of a batch,
read lanes of their own when their number divides that of the lanes, and all of them together read the dataset once an
epoch. Along a lane, the records of about `window` blocks at a time are shuffled together by a keyed permutation (a
Feistel network of four rounds over the next power of four, walked until it falls inside: Black & Rogaway 2002).

No state is needed to start at any n, and world size and worker count do not appear here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.philox import Stream, mix64, words_numpy

ORDER = 3  # version of what a sample number means: any change of it raises this
LANES = 64  # at most, or
LANE_SAMPLES = 32  # as many as leave each this much of a batch: large batches are for many nodes
WINDOW = 4  # blocks whose records are shuffled together
GROUP = 8  # shards whose blocks are mixed
ROUNDS = 4
EPOCH_TABLES = 2  # epochs whose tables are kept


@dataclass(frozen=True)
class Positions:
    """Where samples are: int64 arrays (N,) of epoch, block number, and place among the block's records."""

    epoch: np.ndarray
    block: np.ndarray
    place: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shuffle."""

    blocks: np.ndarray  # (K,) block numbers in shuffled order
    ends: np.ndarray  # (K,) records up to and with each of them
    keys: np.ndarray  # (lanes * windows, ROUNDS) uint64


class Order:
    """The order of a dataset's records over epochs.

    block_sizes: records of each block. block_shards: the shard that each is of; each a shard of its own when None.
    batch: the global batch. tail: what happens to the records that do not fill an epoch's last global batch: "drop"
    leaves them out of that epoch (another few every epoch), "wrap" fills up with records that the lanes began with.
    """

    def __init__(
        self,
        block_sizes: Sequence[int] | np.ndarray,
        seed: int,
        batch: int,
        tail: str = "drop",
        *,
        block_shards: Sequence[int] | np.ndarray | None = None,
        lanes: int = 0,
        window: int = WINDOW,
        group: int = GROUP,
    ) -> None:
        """lanes: 0 takes as many as suit. Raises ConfigError for an unknown tail, lanes that do not divide the batch,
        or a dataset smaller than one batch that is to be dropped."""
        self.sizes = np.asarray(block_sizes, dtype=np.int64)
        self.shards = np.arange(len(self.sizes)) if block_shards is None else np.asarray(block_shards, dtype=np.int64)
        self.seed, self.batch, self.window, self.group = seed, batch, window, group
        self.records = int(self.sizes.sum())
        if tail not in ("drop", "wrap"):
            raise ConfigError(f"data.tail={tail}: choose drop or wrap")
        if self.records == 0 or (tail == "drop" and self.records < batch):
            raise ConfigError(
                f"the dataset has {self.records} records, fewer than one global batch of {batch}: "
                "lower optim.batch, or set data.tail=wrap"
            )
        self.lanes = lanes or suitable_lanes(batch, len(self.sizes), window)
        if batch % self.lanes:
            raise ConfigError(f"{self.lanes} lanes do not divide a global batch of {batch}")
        self.share = batch // self.lanes
        """Records that a batch takes from each lane."""
        self._starts = np.arange(self.lanes + 1) * self.records // self.lanes  # records before each lane
        lengths = np.diff(self._starts)
        batches = int(lengths.min()) // self.share if tail == "drop" else -(-int(lengths.max()) // self.share)
        if tail == "drop" and batches == 0:
            raise ConfigError(f"a lane holds {lengths.min()} records, fewer than the {self.share} that a batch takes")
        self.epoch_samples = batches * batch
        """Samples in an epoch, a multiple of the global batch."""
        self.dropped = max(self.records - self.epoch_samples, 0)
        """Records left out of each epoch."""
        self.repeated = max(self.epoch_samples - self.records, 0)
        """Records seen twice in each epoch."""
        self.windows = max(1, round(len(self.sizes) / self.lanes / window))
        """Windows of each lane."""
        self._tables: dict[int, _Epoch] = {}
        self._lock = threading.Lock()  # streams of one order, each in a thread of its own, may share it

    def locate(self, n: np.ndarray) -> Positions:
        """Sample numbers (N,) -> where each is, in O(log blocks) each after an O(blocks) table per epoch."""
        n = np.asarray(n, dtype=np.int64)
        epoch, place = np.divmod(n, self.epoch_samples)
        block, row = np.empty_like(n), np.empty_like(n)
        for number in np.unique(epoch):
            chosen = epoch == number
            block[chosen], row[chosen] = self._locate_in_epoch(self._table(int(number)), place[chosen])
        return Positions(epoch, block, row)

    def window_bytes(self, block_bytes: Sequence[int] | np.ndarray, first: int, count: int) -> int:
        """Upper bound in bytes of what a reader of places first to first + count - 1 of each batch holds at once, for
        blocks of these sizes."""
        lanes = (first + count - 1) // self.share - first // self.share + 1
        longest = -(-int(np.diff(self._starts).max()) // self.windows)
        smallest = int(np.sort(self.sizes)[: -(-len(self.sizes) // 2)].max(initial=1)) or 1
        touched = min(len(self.sizes), -(-longest // smallest) + 1)
        held = int(np.sort(np.asarray(block_bytes, dtype=np.int64))[-touched:].sum())
        return min(lanes * held, int(np.sum(block_bytes)))

    def _table(self, epoch: int) -> _Epoch:
        """The shuffle of one epoch; the latest few are kept."""
        with self._lock:
            table = self._tables.pop(epoch, None) or self._shuffle(epoch)
            self._tables[epoch] = table
            while len(self._tables) > EPOCH_TABLES:
                del self._tables[next(iter(self._tables))]
        return table

    def _shuffle(self, epoch: int) -> _Epoch:
        shards = int(self.shards.max()) + 1
        rank = np.empty(shards, dtype=np.int64)
        rank[np.argsort(self._words(epoch, 0, shards, 1)[:, 0], kind="stable")] = np.arange(shards)
        keys = self._words(epoch, 1, len(self.sizes), 1)[:, 0]
        blocks = np.lexsort((keys, rank[self.shards] // self.group))
        return _Epoch(blocks, np.cumsum(self.sizes[blocks]), self._words(epoch, 2, self.lanes * self.windows, ROUNDS))

    def _words(self, epoch: int, purpose: int, count: int, width: int) -> np.ndarray:
        """(count, width) uint64 of this epoch's shuffle."""
        counter = (np.uint64(epoch * 4 + purpose) << np.uint64(32)) + np.arange(count, dtype=np.uint64)
        words = words_numpy(self.seed, Stream.SHUFFLE, counter, 2 * width).astype(np.uint64)
        return (words[:, 0::2] << np.uint64(32)) | words[:, 1::2]

    def _locate_in_epoch(self, table: _Epoch, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places (N,) in [0, epoch_samples) of one epoch -> block numbers and places in them."""
        batch, within = np.divmod(place, self.batch)
        lane, k = np.divmod(within, self.share)
        length = self._starts[lane + 1] - self._starts[lane]
        along = (batch * self.share + k) % length  # "wrap" begins a lane again
        window = along * self.windows // length
        start = -(-window * length // self.windows)
        size = -(-(window + 1) * length // self.windows) - start
        keys = table.keys[lane * self.windows + window]
        bits = _bit_length(np.maximum(size - 1, 1))
        shuffled = start + permute(along - start, size, keys, ((bits + 1) // 2).astype(np.uint64))
        ordinal = np.searchsorted(table.ends, self._starts[lane] + shuffled, side="right")
        block = table.blocks[ordinal]
        return block, self._starts[lane] + shuffled - (table.ends[ordinal] - self.sizes[block])


def suitable_lanes(batch: int, blocks: int, window: int) -> int:
    """The most lanes, up to LANES or one for LANE_SAMPLES of the batch, that divide the batch and leave each lane a
    window of blocks at least."""
    most = max(1, min(max(LANES, batch // LANE_SAMPLES), blocks // window))
    return max(lanes for lanes in range(1, most + 1) if batch % lanes == 0)


def _bit_length(x: np.ndarray) -> np.ndarray:
    """Bits of positive integers below 2**53."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)


def permute(index: np.ndarray, size: np.ndarray, keys: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """A keyed permutation of [0, size): (N,) index and size -> (N,) int64; keys (N, ROUNDS) uint64.

    The network permutes [0, 4**half_bits), which holds [0, size) and is less than four times as large (or 4), so
    walking its cycle from inside returns inside after fewer than four steps on average.
    """
    value, size = index.astype(np.uint64), size.astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        value[outside] = _feistel(value[outside], keys[outside], half_bits[outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, keys: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for i in range(ROUNDS):
        left, right = right, left ^ (mix64(right ^ keys[:, i]) & mask)
    return (left << half_bits) | right
