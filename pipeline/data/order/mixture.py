"""Several datasets mixed by weight: the dataset of sample number n, and the sample's number in that dataset.

Weights become integers whose sum is the period W, and a pattern of W items in which the share of each dataset in any
first items is exact to within one item. So the number of a dataset's items before any item is a table lookup and a
product. A global batch of B has S slots of B / S places each. Each slot goes through the pattern by itself, slot s some
items ahead of slot s - 1, so that the items of one global batch are consecutive in the pattern, and the shares in a
batch are as exact as whole items allow.

Each dataset has its own order (shuffle.py, buckets.py) and its own epochs. Item c that slot s takes from a dataset is
that dataset's number c S + s: its lanes are the slots, so ranks read different slots. Datasets whose latents differ in
size are mixed by batches instead: one slot, whose items are whole batches.

No state is needed to start at any n, and world size and worker count do not appear here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from pipeline.data.order.buckets import Buckets
from pipeline.data.order.shuffle import WINDOW, Order, Positions, suitable_lanes
from pipeline.errors import ConfigError

PERIOD = 4096  # of the pattern if weights are rounded
LONGEST = 65536  # the period if PERIOD would change a share by more than CLOSE; up to it weights are exact
CLOSE = Fraction(1, 100)
OFFSET = 0xD1B54A32D192ED03  # between the seeds of datasets; it differs from that between buckets


class Mixture:
    """Like Order, for several datasets whose blocks are numbered consecutively.

    orders: of each dataset, with a global batch of `slots` items. weights: integers (see `whole_weights`). item: number
    of consecutive samples from one dataset: 1, or a whole batch if there is one slot.
    """

    def __init__(
        self,
        orders: Sequence[Order | Buckets],
        block_counts: Sequence[int],
        weights: Sequence[int],
        seed: int,
        batch: int,
        *,
        slots: int,
        item: int = 1,
    ) -> None:
        """block_counts: number of blocks of each dataset. Raises ConfigError for slots that do not divide the batch."""
        if batch % (slots * item) or any(order.batch != slots * item for order in orders):
            raise ConfigError(f"{slots} slots of items of {item} samples do not divide a global batch of {batch}")
        self.orders, self.weights, self.seed, self.batch = tuple(orders), tuple(weights), seed, batch
        self.slots, self.item = slots, item
        self.records = sum(order.records for order in orders)
        self._first_blocks = np.cumsum([0, *block_counts])[:-1]
        self._slot_items = batch // (slots * item)  # items of a slot in a batch
        self._pattern = interleave(weights)
        weights_array = np.array(weights, dtype=np.int64)
        is_dataset = self._pattern[:, None] == np.arange(len(weights_array))
        self._items_before = np.cumsum(is_dataset, axis=0) - is_dataset  # (W, D) items of each dataset before each item
        self._weights = weights_array

    def locate(self, n: np.ndarray) -> Positions:
        """Sample numbers (N,) -> the position of each. An epoch is that of the sample's dataset."""
        datasets, numbers = self.dataset_numbers(n)
        epoch, block, place = (np.empty_like(numbers) for _ in range(3))
        for number, order in enumerate(self.orders):
            chosen = np.flatnonzero(datasets == number)
            if len(chosen):
                positions = order.locate(numbers[chosen])
                epoch[chosen], block[chosen], place[chosen] = (
                    positions.epoch,
                    self._first_blocks[number] + positions.block,
                    positions.place,
                )
        return Positions(epoch, block, place)

    def dataset_numbers(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (N,) -> (N,) dataset of each, and (N,) its number in that dataset's order."""
        step, place = np.divmod(np.asarray(n, dtype=np.int64), self.batch)
        slot, within = np.divmod(place, self._slot_items * self.item)
        item, inside = np.divmod(within, self.item)
        first_items = slot * self._slot_items  # the item of the pattern at which the slot began
        items = first_items + step * self._slot_items + item
        datasets = self._pattern[items % len(self._pattern)]
        count = self._count_before(datasets, items) - self._count_before(datasets, first_items)
        return datasets, (count * self.slots + slot) * self.item + inside

    def window_bytes(self, block_bytes: Sequence[int] | np.ndarray, first: int, count: int) -> int:
        """Like Order's; the sum over all datasets."""
        begin, end = self._dataset_place(first), self._dataset_place(first + count - 1) + 1
        pieces = np.split(np.asarray(block_bytes, dtype=np.int64), self._first_blocks[1:])
        return sum(
            o.window_bytes(dataset_bytes, begin, end - begin)
            for o, dataset_bytes in zip(self.orders, pieces, strict=True)
        )

    def _dataset_place(self, place: int) -> int:
        """Place in a global batch -> place in a batch of a dataset's own order."""
        return place // (self._slot_items * self.item) * self.item + place % self.item

    def _count_before(self, datasets: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Number of items of datasets `datasets` before items `items` of the pattern, which repeats without end."""
        rounds, within = np.divmod(items, len(self._pattern))
        return rounds * self._weights[datasets] + self._items_before[within, datasets]


AnyOrder = Order | Buckets | Mixture
"""Any order of records."""


def orders_of(order: AnyOrder) -> tuple[Order | Buckets, ...]:
    """The order of each dataset in an order."""
    return order.orders if isinstance(order, Mixture) else (order,)


def dataset_seed(seed: int, number: int) -> int:
    """The seed of dataset `number`; seeds differ so that datasets of equal sizes are not shuffled alike."""
    return (seed + OFFSET * (number + 1)) % 2**64


def suitable_slots(batch: int, blocks: Sequence[int], records: Sequence[int]) -> int:
    """Number of slots for datasets with these numbers of blocks and records: the suitable lanes of the largest dataset,
    but not more than the smallest one has records."""
    return suitable_lanes(batch, min(max(blocks), min(records) * WINDOW), WINDOW)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Positive weights -> integers in their proportions, at least 1 each.

    They are exact if their sum is then at most LONGEST; else they are rounded by largest remainders to a sum of PERIOD,
    or of LONGEST if PERIOD would change a share by more than CLOSE.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    numbers = [int(weight * common) for weight in exact]
    numbers = [number // math.gcd(*numbers) for number in numbers]
    if sum(numbers) <= LONGEST:
        return tuple(numbers)
    rounded = _largest_remainders(numbers, PERIOD)
    worst = max(abs(Fraction(r * sum(numbers), n * PERIOD) - 1) for r, n in zip(rounded, numbers, strict=True))
    return tuple(rounded if worst <= CLOSE else _largest_remainders(numbers, LONGEST))


def _largest_remainders(numbers: Sequence[int], total: int) -> list[int]:
    """Integers of at least 1 that add up to `total`, as nearly as possible in the proportions of `numbers`. Raises
    ConfigError for more numbers than `total`."""
    if len(numbers) > total:
        raise ConfigError(f"{len(numbers)} datasets cannot be mixed: at most {total} can")
    quotas = [Fraction(number * total, sum(numbers)) for number in numbers]
    counts = [max(int(quota), 1) for quota in quotas]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        movable = [i for i in range(len(counts)) if counts[i] + step >= 1]
        chosen = max(movable, key=lambda i: step * (quotas[i] - counts[i]))
        counts[chosen] += step
    return counts


def interleave(weights: Sequence[int]) -> np.ndarray:
    """Integers w -> (sum(w),) int64 numbers of datasets, each w times, as evenly as possible.

    Item c of a dataset with share p may be item k of the pattern if c <= k p, and must come before item (c + 1) / p; of
    the items that may come next, the one with the earliest deadline does (the windows of Baruah et al. 1996; on one
    processor, earliest deadline first never misses). So the number of a dataset's items among any first k items differs
    from k p by less than one.
    """
    total = sum(weights)
    pattern = np.empty(total, dtype=np.int64)
    used = [0] * len(weights)
    for k in range(total):
        due = [
            (-(-(count + 1) * total // weight), number)
            for number, (count, weight) in enumerate(zip(used, weights, strict=True))
            if count * total // weight <= k
        ]
        pattern[k] = chosen = min(due)[1]
        used[chosen] += 1
    return pattern


def share(order: AnyOrder, number: int) -> str:
    """A dataset's share in a mixture, as the end of a message; "" for a single dataset."""
    if not isinstance(order, Mixture):
        return ""
    return f"; {order.weights[number]} of {sum(order.weights)} samples are of it"
