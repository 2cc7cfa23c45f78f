"""Which record is sample number n: pure arithmetic on (seed, n) and the sizes of the dataset's blocks.

A block is a range of one shard's records, small enough to be read at once (blocks.py). Every epoch shuffles the shards,
takes them in groups of `group`, and puts the blocks of a group in random order, so that a reader has few shards open.
This sequence of records is divided into `lanes` equal lanes, each a contiguous part of it. A global batch of B takes
B / lanes records from each lane and holds the lanes one after the other. Ranks take consecutive parts of a batch, so
they read different lanes if their number divides that of the lanes, and together they read the dataset once per epoch.
Within a lane, the records of about `window` blocks at a time are shuffled together by a keyed permutation (a Feistel
network of four rounds over the next power of four, applied until the result falls inside: Black & Rogaway 2002).

No state is needed to start at any n, and nothing here depends on world size or worker count.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.philox import Stream, mix64, words_numpy

ORDER = 3  # version of the meaning of sample numbers: any change of it must raise this
LANES = 64  # most lanes, or
LANE_SAMPLES = 32  # as many as take this many samples of a batch each: large batches are for many nodes
WINDOW = 4  # blocks whose records are shuffled together
GROUP = 8  # shards whose blocks are mixed
ROUNDS = 4
EPOCH_TABLES = 2  # epochs whose tables are kept


@dataclass(frozen=True)
class Positions:
    """Positions of samples: int64 arrays (N,) of epoch, block number, and place among the block's records."""

    epoch: np.ndarray
    block: np.ndarray
    place: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    """The shuffle of one epoch."""

    blocks: np.ndarray  # (K,) block numbers in shuffled order
    ends: np.ndarray  # (K,) number of records up to and including each of them
    keys: np.ndarray  # (lanes * windows, ROUNDS) uint64


class Order:
    """The order of a dataset's records over epochs.

    block_sizes: number of records of each block. block_shards: shard number of each block; None = each block is a
    shard. batch: samples in a global batch. tail: what happens to records that do not fill an epoch's last global
    batch: "drop" leaves them out of that epoch (different ones in each epoch), "wrap" fills the batch with the lanes'
    first records.
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
        """lanes: 0 = a suitable number. Raises ConfigError for an unknown tail, for lanes that do not divide the batch,
        and with tail=drop for a dataset smaller than one batch."""
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
        """Records that come twice in each epoch."""
        self.windows = max(1, round(len(self.sizes) / self.lanes / window))
        """Number of windows of each lane."""
        self._tables: dict[int, _Epoch] = {}
        self._lock = threading.Lock()  # several streams, each in its own thread, may share an order

    def locate(self, n: np.ndarray) -> Positions:
        """Sample numbers (N,) -> the position of each, in O(log blocks) each after a table in O(blocks) per epoch."""
        n = np.asarray(n, dtype=np.int64)
        epoch, place = np.divmod(n, self.epoch_samples)
        block, row = np.empty_like(n), np.empty_like(n)
        for number in np.unique(epoch):
            chosen = epoch == number
            block[chosen], row[chosen] = self._locate_in_epoch(self._table(int(number)), place[chosen])
        return Positions(epoch, block, row)

    def window_bytes(self, block_bytes: Sequence[int] | np.ndarray, first: int, count: int) -> int:
        """Upper bound on the bytes that a reader of places first to first + count - 1 of each batch holds at once.
        block_bytes: size of each block."""
        lanes = (first + count - 1) // self.share - first // self.share + 1
        longest = -(-int(np.diff(self._starts).max()) // self.windows)
        smallest = int(np.sort(self.sizes)[: -(-len(self.sizes) // 2)].max(initial=1)) or 1
        touched = min(len(self.sizes), -(-longest // smallest) + 1)
        lane_bytes = int(np.sort(np.asarray(block_bytes, dtype=np.int64))[-touched:].sum())
        return min(lanes * lane_bytes, int(np.sum(block_bytes)))

    def _table(self, epoch: int) -> _Epoch:
        """The shuffle of one epoch; the latest EPOCH_TABLES are kept."""
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
        """Random words (count, width) uint64 for one purpose in the shuffle of an epoch."""
        counter = (np.uint64(epoch * 4 + purpose) << np.uint64(32)) + np.arange(count, dtype=np.uint64)
        words = words_numpy(self.seed, Stream.SHUFFLE, counter, 2 * width).astype(np.uint64)
        return (words[:, 0::2] << np.uint64(32)) | words[:, 1::2]

    def _locate_in_epoch(self, table: _Epoch, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (N,) within one epoch, in [0, epoch_samples) -> block numbers (N,) and places in them (N,)."""
        batch, within = np.divmod(place, self.batch)
        lane, k = np.divmod(within, self.share)
        length = self._starts[lane + 1] - self._starts[lane]
        place_in_lane = (batch * self.share + k) % length  # "wrap" starts a lane again
        window = place_in_lane * self.windows // length
        start = -(-window * length // self.windows)
        size = -(-(window + 1) * length // self.windows) - start
        keys = table.keys[lane * self.windows + window]
        bits = _bit_length(np.maximum(size - 1, 1))
        shuffled = start + permute(place_in_lane - start, size, keys, ((bits + 1) // 2).astype(np.uint64))
        ordinal = np.searchsorted(table.ends, self._starts[lane] + shuffled, side="right")
        block = table.blocks[ordinal]
        return block, self._starts[lane] + shuffled - (table.ends[ordinal] - self.sizes[block])


def suitable_lanes(batch: int, blocks: int, window: int) -> int:
    """The largest number of lanes, up to LANES or one per LANE_SAMPLES samples of the batch, that divides the batch and
    leaves each lane at least a window of blocks."""
    max_lanes = max(1, min(max(LANES, batch // LANE_SAMPLES), blocks // window))
    return max(lanes for lanes in range(1, max_lanes + 1) if batch % lanes == 0)


def _bit_length(x: np.ndarray) -> np.ndarray:
    """Number of bits of positive integers below 2**53."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)


def permute(index: np.ndarray, size: np.ndarray, keys: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """A keyed permutation of [0, size): (N,) index and size -> (N,) int64; keys (N, ROUNDS) uint64.

    The network permutes [0, 4**half_bits), which contains [0, size) and is less than four times as large (or is 4), so
    following its cycle from inside [0, size) returns there after fewer than four steps on average.
    """
    value, size = index.astype(np.uint64), size.astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        value[outside] = _feistel(value[outside], keys[outside], half_bits[outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, keys: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """The Feistel network on values (N,) uint64 in [0, 4**half_bits)."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for i in range(ROUNDS):
        left, right = right, left ^ (mix64(right ^ keys[:, i]) & mask)
    return (left << half_bits) | right
