"""mixture.py and dataset.py: shares are exact, each dataset comes once per its own epoch, from any start."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.format.kept import KeptRecords
from pipeline.data.order.blocks import Blocks
from pipeline.data.order.dataset import Dataset, Part
from pipeline.data.order.mixture import LONGEST, PERIOD, Mixture, interleave, suitable_slots, whole_weights
from pipeline.data.order.shuffle import LANES
from pipeline.errors import ConfigError
from pipeline.runs.ledger import Stretch, record_hashes
from pipeline.runs.proof import prove

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def part(name: str, sizes: list[int], kinds: int = 1, latent: int = 8, block_bytes: int = 2000) -> Part:
    """A cache of shards with these numbers of records of 500 bytes each; shard i is of bucket i % kinds."""
    shards = [SimpleNamespace(name=f"{i}", samples=n, bytes=500 * n, size=(i % kinds, 1)) for i, n in enumerate(sizes)]
    contract = SimpleNamespace(buckets=tuple((i, 1) for i in range(kinds)), latent_shape=(4, latent, latent))
    manifest = SimpleNamespace(shards=shards, contract=contract, columns=())
    blocks = Blocks(manifest, KeptRecords(manifest, np.empty((0, 2), dtype=np.int32)), block_bytes)  # type: ignore[arg-type]
    return Part(SimpleNamespace(url=name), manifest, blocks)  # type: ignore[arg-type]


@st.composite
def mixtures(draw: st.DrawFn, tails: tuple[str, ...] = ("drop", "wrap")) -> tuple[Dataset, Mixture]:
    """Any datasets, weights, batch and seed; mixed by batches if there are buckets or latents of two sizes."""
    count = draw(st.integers(2, 4))
    batch = draw(st.sampled_from([4, 8, 12, 24]))
    by_batch = draw(st.booleans())
    sizes = st.lists(st.integers(24 if by_batch else 1, 60), min_size=1, max_size=8)
    parts = [
        part(f"c{i}", draw(sizes), draw(st.integers(1, 2)) if by_batch else 1, 8 + (by_batch and i % 2))
        for i in range(count)
    ]
    weights = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    dataset = Dataset(parts)
    order = dataset.order(draw(st.integers(0, 2**64 - 1)), batch, draw(st.sampled_from(tails)), weights)
    assert isinstance(order, Mixture)
    assert (order.item == batch) == by_batch or batch == order.slots == 1
    return dataset, order


# --------------------------------------------------------------------------------------------------------------------
# Weights


@given(WEIGHTS)
def test_of_any_first_items_each_dataset_has_its_share_within_less_than_one(weights: list[int]) -> None:
    pattern = interleave(weights)
    counts = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, sum(weights) + 1)[:, None] * np.array(weights)
    assert (np.abs(counts * sum(weights) - due) < sum(weights)).all()
    assert counts[-1].tolist() == weights


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([0.7, 0.2, 0.1], (7, 2, 1)),
        ([70, 20, 10], (7, 2, 1)),
        ([1 / 3, 2 / 3], (1, 2)),
        ([1e-3, 1], (1, 1000)),
        ([12_000_000, 3_000_000], (4, 1)),
    ],
)
def test_weights_that_are_ratios_of_small_numbers_stay_exact(weights: list[float], whole: tuple[int, ...]) -> None:
    assert whole_weights(weights) == whole


@given(st.lists(st.floats(1e-9, 1e12), min_size=2, max_size=8))
def test_other_weights_are_rounded_to_a_period_and_none_is_lost(weights: list[float]) -> None:
    whole = whole_weights(weights)
    assert min(whole) >= 1
    assert sum(whole) <= LONGEST
    if sum(whole) == PERIOD:
        total = sum(Fraction(str(w)) for w in weights)
        shares = [Fraction(str(w)) / total for w in weights]
        assert all(abs(Fraction(w, PERIOD) / s - 1) <= Fraction(1, 100) for w, s in zip(whole, shares, strict=True))


def test_a_rare_dataset_makes_the_period_longer() -> None:
    assert whole_weights([1_000_003, 350]) == (LONGEST - 23, 23)
    assert sum(whole_weights([1_000_003, 500_009])) == PERIOD


# --------------------------------------------------------------------------------------------------------------------
# The order


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(1, 40))
def test_shares_are_exact_within_two_items_in_every_slot_and_every_batch(
    made: tuple[Dataset, Mixture], steps: int
) -> None:
    _, order = made
    which, _ = order.dataset_numbers(np.arange(steps * order.batch))
    shares = np.array(order.weights) / sum(order.weights)
    items = which.reshape(steps, order.slots, -1, order.item)
    assert (items == items[..., :1]).all()
    one_hot = items[..., 0, None] == np.arange(len(shares))
    for counted in (one_hot.sum(axis=(1, 2)), one_hot.sum(axis=(0, 2))):  # of each batch, of each slot
        total = counted.sum(axis=-1, keepdims=True)
        assert (np.abs(counted - total * shares) < 2).all()


@settings(max_examples=60, deadline=None)
@given(mixtures())
def test_each_record_comes_once_in_an_epoch_of_its_own_dataset_and_tails_are_counted(
    made: tuple[Dataset, Mixture],
) -> None:
    dataset, order = made
    turns = [own.epoch_samples * sum(order.weights) / w for own, w in zip(order.orders, order.weights, strict=True)]
    steps = int(1.2 * min(max(turns), 30_000)) // order.batch + 3
    places = order.locate(np.arange(steps * order.batch))
    of = dataset.part_of(places.block)
    for number, own in enumerate(order.orders):
        mine = of == number
        for epoch in range(int(places.epoch[mine].max(initial=0))):
            now = mine & (places.epoch == epoch)
            if now.sum() < own.epoch_samples:
                continue
            seen = set(zip(places.block[now].tolist(), places.place[now].tolist(), strict=True))
            assert now.sum() == own.epoch_samples
            assert len(seen) == own.records - own.dropped == own.epoch_samples - own.repeated
    assert (places.place < dataset.counts[places.block]).all()


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_an_epoch_is_whole_before_the_next_but_one_begins(made: tuple[Dataset, Mixture]) -> None:
    """Each dataset's own numbers are used without gaps: after any batch, all except the last few have been used."""
    _, order = made
    which, own = order.dataset_numbers(np.arange(200 * order.batch))
    for number in range(len(order.orders)):
        mine = np.sort(own[which == number])
        assert len(np.unique(mine)) == len(mine)
        gapless = len(mine) - 4 * order.slots * order.item
        assert gapless <= 0 or (mine[:gapless] == np.arange(gapless)).all()


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(0, 10**9), st.sampled_from([1, 2, 4]))
def test_any_start_and_any_world_give_the_same_batches(made: tuple[Dataset, Mixture], first: int, world: int) -> None:
    _, order = made
    start = first // order.batch * order.batch
    numbers = start + np.arange(6 * order.batch)
    whole = order.locate(numbers)
    for rank in range(world):
        share = order.batch // world
        mine = np.flatnonzero(np.arange(len(numbers)) % order.batch // share == rank)
        found = order.locate(numbers[mine])
        assert (found.block == whole.block[mine]).all()
        assert (found.place == whole.place[mine]).all()
        assert (found.epoch == whole.epoch[mine]).all()


def test_a_rank_reads_only_lanes_of_its_own() -> None:
    """Two datasets of 512 blocks, 16 slots, 4 ranks: one rank reads each block, except blocks that a border cuts."""
    dataset = Dataset([part("a", [16] * 128), part("b", [16] * 128)])
    order = dataset.order(3, 16, weights=(3, 1))
    assert isinstance(order, Mixture)
    assert order.slots == 16
    readers: dict[tuple[int, int], set[int]] = {}
    numbers = np.arange(8 * dataset.counts.sum())
    places = order.locate(numbers)
    for block, epoch, n in zip(places.block.tolist(), places.epoch.tolist(), numbers.tolist(), strict=True):
        readers.setdefault((block, epoch), set()).add(n % 16 // 4)
    assert sum(len(ranks) > 1 for ranks in readers.values()) <= 0.01 * len(readers)
    needed = order.window_bytes(dataset.bytes, 4, 4)
    assert needed == sum(own.window_bytes(dataset.bytes[:512], 4, 4) for own in order.orders)


def test_datasets_of_equal_sizes_are_not_shuffled_alike() -> None:
    dataset = Dataset([part("a", [40] * 10), part("b", [40] * 10)])
    order = dataset.order(3, 8, weights=(1, 1))
    places = order.locate(np.arange(800))
    of = dataset.part_of(places.block)
    where = [(places.block - dataset.block_starts[of])[of == number][:390] for number in (0, 1)]
    assert (where[0] == where[1]).mean() < 0.1


def test_one_dataset_is_ordered_as_without_a_mixture() -> None:
    alone = part("a", [31, 17, 40])
    order = Dataset([alone]).order(5, 8)
    assert type(order) is type(alone.blocks.order(5, 8))
    numbers = np.arange(200)
    assert (order.locate(numbers).block == alone.blocks.order(5, 8).locate(numbers).block).all()
    assert Dataset([alone]).whole_weights() == ()


def test_weights_that_nobody_gave_are_the_numbers_of_records() -> None:
    dataset = Dataset([part("a", [30, 30]), part("b", [15])])
    assert dataset.whole_weights() == (4, 1)
    order = dataset.order(0, 4)
    assert isinstance(order, Mixture)
    assert order.weights == (4, 1)


def test_slots_suit_the_largest_dataset_and_the_smallest_has_a_record_for_each() -> None:
    assert suitable_slots(256, [4000, 10], [10**6, 10**4]) == LANES
    assert suitable_slots(256, [4000, 1], [10**6, 5]) == 4
    assert suitable_slots(256, [1, 1], [10, 10]) == 1


def test_a_dataset_that_is_too_small_is_refused_by_name() -> None:
    large, small, none = part("large", [64] * 4), part("small", [5], latent=16), part("none", [])
    with pytest.raises(
        ConfigError, match=r"small cannot be mixed in: .* has 5 records, fewer than one global batch of 8"
    ):
        Dataset([large, small]).order(0, 8)
    Dataset([large, small]).order(0, 8, "wrap")
    with pytest.raises(ConfigError, match="none has no records: leave it out"):
        Dataset([large, none]).order(0, 8)
    Dataset([large, part("five", [5])]).order(0, 8)


def test_the_mixture_is_what_it_was_when_it_was_published() -> None:
    """Other values would change the data of every resumed run: these are part of the format."""
    assert interleave([4, 2, 1]).tolist() == [0, 0, 1, 0, 1, 0, 2]
    dataset = Dataset([part("a", [9, 7, 8] * 3), part("b", [12, 5])])
    order = dataset.order(7, 8, weights=(2, 1))
    assert isinstance(order, Mixture)
    assert (order.slots, order.item) == (4, 1)
    places = order.locate(80 + np.arange(16))
    assert places.block.tolist() == [21, 11, 0, 25, 4, 5, 22, 9, 16, 21, 18, 19, 22, 20, 8, 22]
    assert places.place.tolist() == [3, 0, 2, 0, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert places.epoch.tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]


# --------------------------------------------------------------------------------------------------------------------
# The proof


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.sampled_from([1, 2, 4]), st.integers(1, 120))
def test_epochs_of_each_dataset_are_proved_with_what_they_leave_out_or_repeat(
    made: tuple[Dataset, Mixture], world: int, steps: int
) -> None:
    dataset, order = made
    numbers = np.arange(steps * order.batch)
    found = order.locate(numbers)
    hashes = record_hashes(numbers, *dataset.records_at(found.block, found.place)).reshape(steps, world, -1)
    lines = [
        Stretch(0, len(numbers), rank, world, hashes[:, rank].size, int(hashes[:, rank].sum()), 0)
        for rank in range(world)
    ]
    proof = prove(lines, len(numbers), order, dataset)
    assert proof.problems == []
    assert sum(epoch.samples for epoch in proof.epochs) == len(numbers)
    of = dataset.part_of(found.block)
    names = [(e.part, e.number) for e in proof.epochs]
    assert names == sorted(set(zip(of.tolist(), found.epoch.tolist(), strict=True)))
    for epoch in proof.epochs:
        own = order.orders[epoch.part]
        if epoch.whole:
            assert own.records - epoch.used == own.dropped
            assert epoch.samples - epoch.used == own.repeated
