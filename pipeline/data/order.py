"""Which record is sample number n: pure arithmetic on (seed, n) and the sizes of the shards.

Every epoch shuffles the shards and cuts the shuffled list into windows of up to `window` shards, as even as can be. The
records of a window are shuffled together by a keyed permutation (a Feistel network of four rounds over the next power
of four, walked until it falls inside: Black & Rogaway 2002), so a reader holds one window at a time, and no state is
needed to start at any n. World size and worker count do not appear here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError
from pipeline.philox import Stream, words_numpy

WINDOW = 8  # shards shuffled together
ROUNDS = 4
EPOCH_TABLES = 4  # epochs whose tables are kept


@dataclass(frozen=True)
class Positions:
    """Where samples are: int64 arrays (N,) of epoch, shard number in the manifest, and row in the shard."""

    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shuffle."""

    shards: np.ndarray  # (S,) shard numbers in shuffled order
    ends: np.ndarray  # (S,) records up to and with each of them
    window_starts: np.ndarray  # (W + 1,) records before each window
    keys: np.ndarray  # (W, ROUNDS) uint64
    half_bits: np.ndarray  # (W,) uint64, half the width of each window's permutation


class Order:
    """The order of a dataset's records over epochs.

    shard_sizes: records of each shard of the manifest. batch: the global batch. tail: what happens to the records that
    do not fill an epoch's last global batch: "drop" leaves them out of that epoch (another few every epoch), "wrap"
    fills the batch with the epoch's first records.
    """

    def __init__(
        self, shard_sizes: Sequence[int], seed: int, batch: int, tail: str = "drop", *, window: int = WINDOW
    ) -> None:
        """Raises ConfigError for an unknown tail or a dataset smaller than one batch that is to be dropped."""
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed, self.batch, self.window = seed, batch, window
        self.records = int(self.sizes.sum())
        spare = self.records % batch
        if tail not in ("drop", "wrap"):
            raise ConfigError(f"data.tail={tail}: choose drop or wrap")
        if self.records == 0 or (tail == "drop" and self.records < batch):
            raise ConfigError(
                f"the dataset has {self.records} records, fewer than one global batch of {batch}: "
                "lower optim.batch, or set data.tail=wrap"
            )
        self.dropped = spare if tail == "drop" else 0
        """Records left out of each epoch."""
        self.repeated = -self.records % batch if tail == "wrap" else 0
        """Records seen twice in each epoch."""
        self.epoch_samples = self.records - self.dropped + self.repeated
        """Samples in an epoch, a multiple of the global batch."""
        windows = -(-len(self.sizes) // window)
        self._window_shards = np.arange(windows + 1) * len(self.sizes) // windows  # shards before each window
        self._tables: dict[int, _Epoch] = {}

    def locate(self, n: np.ndarray) -> Positions:
        """Sample numbers (N,) -> where each is, in O(log shards) each after an O(shards) table per epoch."""
        n = np.asarray(n, dtype=np.int64)
        epoch, place = np.divmod(n, self.epoch_samples)
        place %= self.records  # the samples that "wrap" repeats
        shard, row = np.empty_like(n), np.empty_like(n)
        for number in np.unique(epoch):
            chosen = epoch == number
            shard[chosen], row[chosen] = self._locate_in_epoch(self._table(int(number)), place[chosen])
        return Positions(epoch, shard, row)

    def largest_window(self, shard_bytes: Sequence[int]) -> int:
        """Upper bound in bytes of one window of shards of the given sizes: what a reader must hold at once."""
        widest = int(np.diff(self._window_shards).max())
        return int(np.sort(np.asarray(shard_bytes, dtype=np.int64))[-widest:].sum())

    def _table(self, epoch: int) -> _Epoch:
        """The shuffle of one epoch; the latest few are kept."""
        table = self._tables.pop(epoch, None) or self._shuffle(epoch)
        self._tables[epoch] = table
        while len(self._tables) > EPOCH_TABLES:
            del self._tables[next(iter(self._tables))]
        return table

    def _shuffle(self, epoch: int) -> _Epoch:
        counter = (np.uint64(epoch) << np.uint64(32)) + np.arange(len(self.sizes), dtype=np.uint64)
        words = words_numpy(self.seed, Stream.SHUFFLE, counter, 4 + 2 * ROUNDS).astype(np.uint64)
        pairs = (words[:, 0::2] << np.uint64(32)) | words[:, 1::2]
        shards = np.argsort(pairs[:, 0], kind="stable")
        ends = np.cumsum(self.sizes[shards])
        starts = np.concatenate([[0], ends])[self._window_shards]
        bits = np.array([max(int(size) - 1, 1).bit_length() for size in np.diff(starts)])
        keys = pairs[: len(starts) - 1, 2 : 2 + ROUNDS]
        return _Epoch(shards, ends, starts, keys, ((bits + 1) // 2).astype(np.uint64))

    def _locate_in_epoch(self, table: _Epoch, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places (N,) in [0, records) of one epoch -> shard numbers and rows."""
        window = np.searchsorted(table.window_starts, place, side="right") - 1
        start = table.window_starts[window]
        size = table.window_starts[window + 1] - start
        shuffled = start + permute(place - start, size, table.keys[window], table.half_bits[window])
        ordinal = np.searchsorted(table.ends, shuffled, side="right")
        shard = table.shards[ordinal]
        return shard, shuffled - (table.ends[ordinal] - self.sizes[shard])


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
        left, right = right, left ^ (_mix(right ^ keys[:, i]) & mask)
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Stafford's variant 13 of MurmurHash3's finalizer: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
