"""Several datasets mixed by weight: which dataset sample number n is of, and which number it is there.

Weights become integers with a period W, and a pattern of W items in which every dataset's share of any first items is
exact within one item; so how many of a dataset came before any item is a table and a product. A global batch of B has
S slots of B / S places each. Every slot walks the pattern by itself, slot s some items ahead of slot s - 1, so that the
items of one global batch follow each other in the pattern, and a batch has the shares as nearly as whole items can.

Each dataset has an order of its own (order.py, buckets.py) and turns over at its own pace. Item c that slot s takes
from a dataset is that dataset's own number c S + s: its lanes are the slots, so ranks read slots of their own.
Datasets whose latents differ in size are mixed batch by batch instead: one slot, whose items are whole batches.

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

PERIOD = 4096  # of the pattern, where weights are rounded
LONGEST = 65536  # the same where that would change a share by more than CLOSE; weights that need no more are exact
CLOSE = Fraction(1, 100)
OFFSET = 0xD1B54A32D192ED03  # between the seeds of datasets; another than that between buckets'


class Mixture:
    """As Order, for several datasets whose blocks are numbered one after the other.

    orders: each dataset's own; their global batch is that of `slots` items. weights: integers (see `whole_weights`).
    item: samples that follow each other in one dataset: 1, or a whole batch with one slot.
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
        """block_counts: blocks of each dataset."""
        if batch % (slots * item) or any(order.batch != slots * item for order in orders):
            raise ConfigError(f"{slots} slots of items of {item} samples do not divide a global batch of {batch}")
        self.orders, self.weights, self.seed, self.batch = tuple(orders), tuple(weights), seed, batch
        self.slots, self.item = slots, item
        self.records = sum(order.records for order in orders)
        self._firsts = np.cumsum([0, *block_counts])[:-1]
        self._ahead = batch // (slots * item)  # items of a slot in each batch
        self._pattern = interleave(weights)
        whole = np.array(weights, dtype=np.int64)
        of_each = self._pattern[:, None] == np.arange(len(whole))
        self._before = np.cumsum(of_each, axis=0) - of_each  # (W, D) items of each dataset before each item
        self._weights = whole

    def locate(self, n: np.ndarray) -> Positions:
        """Sample numbers (N,) -> where each is. Epochs are those of the dataset that the block is of."""
        which, own = self.own_numbers(n)
        epoch, block, place = (np.empty_like(own) for _ in range(3))
        for number, order in enumerate(self.orders):
            here = np.flatnonzero(which == number)
            if len(here):
                found = order.locate(own[here])
                epoch[here], block[here], place[here] = found.epoch, self._firsts[number] + found.block, found.place
        return Positions(epoch, block, place)

    def own_numbers(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers (N,) -> (N,) the dataset of each, and its number in that dataset's order."""
        step, place = np.divmod(np.asarray(n, dtype=np.int64), self.batch)
        slot, within = np.divmod(place, self._ahead * self.item)
        item, inside = np.divmod(within, self.item)
        begins = slot * self._ahead  # where the slot's walk along the pattern began
        at = begins + step * self._ahead + item
        which = self._pattern[at % len(self._pattern)]
        count = self._counted(which, at) - self._counted(which, begins)
        return which, (count * self.slots + slot) * self.item + inside

    def window_bytes(self, block_bytes: Sequence[int] | np.ndarray, first: int, count: int) -> int:
        """As Order's: of all datasets together."""
        begin, end = self._own_place(first), self._own_place(first + count - 1) + 1
        pieces = np.split(np.asarray(block_bytes, dtype=np.int64), self._firsts[1:])
        return sum(o.window_bytes(mine, begin, end - begin) for o, mine in zip(self.orders, pieces, strict=True))

    def _own_place(self, place: int) -> int:
        """Place in a global batch -> place in a batch of a dataset's own order."""
        return place // (self._ahead * self.item) * self.item + place % self.item

    def _counted(self, which: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Items of datasets `which` before items `at` of the pattern, repeated for ever."""
        rounds, within = np.divmod(at, len(self._pattern))
        return rounds * self._weights[which] + self._before[within, which]


AnyOrder = Order | Buckets | Mixture
"""What a dataset's records come in."""


def orders_of(order: AnyOrder) -> tuple[Order | Buckets, ...]:
    """The order of each dataset."""
    return order.orders if isinstance(order, Mixture) else (order,)


def own_seed(seed: int, number: int) -> int:
    """The seed of dataset `number`, so that datasets of equal sizes are not shuffled alike."""
    return (seed + OFFSET * (number + 1)) % 2**64


def suitable_slots(batch: int, blocks: Sequence[int], records: Sequence[int]) -> int:
    """Slots for datasets of so many blocks and records: the lanes that suit the largest, and no more than the smallest
    has records."""
    return suitable_lanes(batch, min(max(blocks), min(records) * WINDOW), WINDOW)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Positive weights -> integers in their proportions, at least 1 each.

    Exact where their sum is then LONGEST at most; else rounded by largest remainders to a sum of PERIOD, or of LONGEST
    where that would change a share by more than CLOSE.
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
    """Integers of at least 1 that add up to `total`, in the proportions of `numbers` as nearly as can be."""
    if len(numbers) > total:
        raise ConfigError(f"{len(numbers)} datasets are mixed; {total} at most can be")
    quotas = [Fraction(number * total, sum(numbers)) for number in numbers]
    whole = [max(int(quota), 1) for quota in quotas]
    while sum(whole) != total:
        step = 1 if sum(whole) < total else -1
        movable = [i for i in range(len(whole)) if whole[i] + step >= 1]
        chosen = max(movable, key=lambda i: step * (quotas[i] - whole[i]))
        whole[chosen] += step
    return whole


def interleave(weights: Sequence[int]) -> np.ndarray:
    """Integers w -> (sum(w),) int64 numbers of datasets, each w times, as evenly as can be.

    Item c of a dataset of share p may stand where c <= k p of the items before it are due, and must before (c + 1) / p
    items are over; the one whose time is up soonest comes next (the windows of Baruah et al. 1996; on one processor,
    earliest deadline first never misses). So of any first k items, a dataset has k p within less than one.
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
    """The part of a mixture's samples that is of a dataset; "" where there is but one."""
    if not isinstance(order, Mixture):
        return ""
    return f"; {order.weights[number]} of {sum(order.weights)} samples are of it"
