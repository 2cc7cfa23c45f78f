"""The order of a dataset with aspect-ratio buckets: each global batch is of one bucket, the same on all ranks.

Each bucket has its own order (shuffle.py). An epoch is a shuffled sequence of the buckets' batches, as many of each as
its records fill, so buckets occur as often as in the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.order.shuffle import EPOCH_TABLES, Order, Positions
from pipeline.errors import ConfigError
from pipeline.philox import GOLDEN, Stream, words_numpy

SCHEDULE = 3  # purpose in the counter of random words, after those of Order


class Buckets:
    """Like Order, for blocks of several buckets.

    block_buckets: the bucket of each block. tail: with "drop", records of a bucket that do not fill a batch of all its
    lanes are dropped (different ones in each epoch), and a bucket with fewer records than a batch is dropped in all
    epochs; "wrap" fills up each bucket's last batch.
    """

    def __init__(
        self,
        block_sizes: np.ndarray,
        block_buckets: np.ndarray,
        seed: int,
        batch: int,
        tail: str = "drop",
        *,
        block_shards: np.ndarray,
        lanes: int = 0,
        window: int = 0,
    ) -> None:
        """Raises ConfigError, as Order does, when no bucket fills a batch."""
        self.seed, self.batch, self.records = seed, batch, int(block_sizes.sum())
        self._blocks: list[np.ndarray] = []
        self._orders: list[Order] = []
        problem: ConfigError | None = None
        options = {"window": window} if window else {}
        for bucket in np.unique(block_buckets).tolist():
            bucket_blocks = np.flatnonzero(block_buckets == bucket)
            # Each bucket has its own seed, so that buckets of equal sizes are not shuffled alike.
            bucket_seed = (seed + GOLDEN * (bucket + 1)) % 2**64
            try:
                order = Order(
                    block_sizes[bucket_blocks],
                    bucket_seed,
                    batch,
                    tail,
                    block_shards=block_shards[bucket_blocks],
                    lanes=lanes,
                    **options,
                )
            except ConfigError as error:
                problem = error
                continue
            self._blocks.append(bucket_blocks)
            self._orders.append(order)
        if not self._orders:
            raise problem or ConfigError("the dataset has no records")
        self._batches = np.array([order.epoch_samples // batch for order in self._orders])
        self.epoch_samples = int(self._batches.sum()) * batch
        self.repeated = sum(order.repeated for order in self._orders)
        self.dropped = self.records - (self.epoch_samples - self.repeated)
        self.window = max(order.window for order in self._orders)
        self._schedules: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, n: np.ndarray) -> Positions:
        """Sample numbers (N,) -> the position of each."""
        n = np.asarray(n, dtype=np.int64)
        epoch, place = np.divmod(n, self.epoch_samples)
        step, within = np.divmod(place, self.batch)
        block, row = np.empty_like(n), np.empty_like(n)
        for number in np.unique(epoch).tolist():
            buckets, turns = self._schedule(number)
            for bucket, order in enumerate(self._orders):
                chosen = np.flatnonzero(epoch == number)
                chosen = chosen[buckets[step[chosen]] == bucket]
                if len(chosen):
                    bucket_number = number * order.epoch_samples + turns[step[chosen]] * self.batch + within[chosen]
                    positions = order.locate(bucket_number)
                    block[chosen], row[chosen] = self._blocks[bucket][positions.block], positions.place
        return Positions(epoch, block, row)

    def window_bytes(self, block_bytes: Sequence[int] | np.ndarray, first: int, count: int) -> int:
        """Like Order's; the sum over all buckets, because any of them may come next."""
        all_bytes = np.asarray(block_bytes, dtype=np.int64)
        return sum(o.window_bytes(all_bytes[b], first, count) for b, o in zip(self._blocks, self._orders, strict=True))

    def _schedule(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(T,) bucket of each batch of an epoch, and (T,) number of earlier batches of that bucket; results of the
        latest epochs are kept."""
        if epoch not in self._schedules:
            buckets = np.repeat(np.arange(len(self._batches)), self._batches)
            counter = (np.uint64(epoch * 4 + SCHEDULE) << np.uint64(32)) + np.arange(len(buckets), dtype=np.uint64)
            words = words_numpy(self.seed, Stream.SHUFFLE, counter, 2).astype(np.uint64)
            buckets = buckets[np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable")]
            turns = np.empty_like(buckets)
            for bucket in range(len(self._batches)):
                turns[buckets == bucket] = np.arange(self._batches[bucket])
            self._schedules[epoch] = buckets, turns
            while len(self._schedules) > EPOCH_TABLES:
                del self._schedules[next(iter(self._schedules))]
        return self._schedules[epoch]
