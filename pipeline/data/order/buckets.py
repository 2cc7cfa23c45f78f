"""The order of a dataset of aspect-ratio buckets: every global batch is of one bucket, on all ranks the same one.

Each bucket has an order of its own (order.py). An epoch is a shuffled sequence of its buckets' batches, as many of each
as its records fill, so buckets come as often as the data has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.order.shuffle import EPOCH_TABLES, Order, Positions
from pipeline.errors import ConfigError
from pipeline.philox import GOLDEN, Stream, words_numpy

SCHEDULE = 3  # what a shuffle's counter is for: after those of Order


class Buckets:
    """As Order, for blocks of several buckets.

    block_buckets: the bucket of each block. Records of a bucket that do not fill a batch of all its lanes are dropped
    (another few every epoch); those of a bucket with fewer than one batch, always. tail: "drop"; "wrap" fills up each
    bucket's last batch.
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
        """Raises ConfigError as Order does, when no bucket fills a batch."""
        self.seed, self.batch, self.records = seed, batch, int(block_sizes.sum())
        self._blocks: list[np.ndarray] = []
        self._orders: list[Order] = []
        problem: ConfigError | None = None
        options = {"window": window} if window else {}
        for bucket in np.unique(block_buckets).tolist():
            mine = np.flatnonzero(block_buckets == bucket)
            # Buckets differ in their seed, so that blocks of one number are not shuffled alike.
            own = (seed + GOLDEN * (bucket + 1)) % 2**64
            try:
                order = Order(
                    block_sizes[mine], own, batch, tail, block_shards=block_shards[mine], lanes=lanes, **options
                )
            except ConfigError as error:
                problem = error
                continue
            self._blocks.append(mine)
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
        """Sample numbers (N,) -> where each is."""
        n = np.asarray(n, dtype=np.int64)
        epoch, place = np.divmod(n, self.epoch_samples)
        step, within = np.divmod(place, self.batch)
        block, row = np.empty_like(n), np.empty_like(n)
        for number in np.unique(epoch).tolist():
            buckets, turns = self._schedule(number)
            for bucket, order in enumerate(self._orders):
                here = np.flatnonzero(epoch == number)
                here = here[buckets[step[here]] == bucket]
                if len(here):
                    own = number * order.epoch_samples + turns[step[here]] * self.batch + within[here]
                    found = order.locate(own)
                    block[here], row[here] = self._blocks[bucket][found.block], found.place
        return Positions(epoch, block, row)

    def window_bytes(self, block_bytes: Sequence[int] | np.ndarray, first: int, count: int) -> int:
        """As Order's: of all buckets, for any of them may come next."""
        whole = np.asarray(block_bytes, dtype=np.int64)
        return sum(o.window_bytes(whole[b], first, count) for b, o in zip(self._blocks, self._orders, strict=True))

    def _schedule(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(T,) bucket of each batch of an epoch, and how many of that bucket's came before; the latest few are kept."""
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
