"""data/order.py: every record once an epoch, whoever asks, from anywhere, and well mixed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import Order
from pipeline.errors import ConfigError

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) >= 8)
SEEDS = st.integers(0, 2**64 - 1)


def records(order: Order, numbers: np.ndarray) -> list[tuple[int, int]]:
    places = order.locate(numbers)
    return list(zip(places.shard.tolist(), places.row.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.integers(1, 8), st.integers(1, 9), st.integers(0, 1000))
def test_an_epoch_sees_each_record_at_most_once_and_all_but_the_tail(
    sizes: list[int], seed: int, batch: int, window: int, epoch: int
) -> None:
    order = Order(sizes, seed, batch, window=window)
    seen = records(order, epoch * order.epoch_samples + np.arange(order.epoch_samples))
    there = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    assert len(seen) == len(set(seen)) == sum(sizes) - order.dropped
    assert set(seen) <= there
    assert order.dropped == sum(sizes) % batch


@settings(max_examples=30, deadline=None)
@given(SIZES, SEEDS, st.integers(1, 8))
def test_wrap_sees_every_record_and_repeats_only_what_fills_the_last_batch(
    sizes: list[int], seed: int, batch: int
) -> None:
    order = Order(sizes, seed, batch, "wrap")
    seen = records(order, 3 * order.epoch_samples + np.arange(order.epoch_samples))
    assert order.epoch_samples % batch == 0
    assert len(set(seen)) == sum(sizes)
    assert len(seen) - len(set(seen)) == order.repeated < batch


@settings(max_examples=30, deadline=None)
@given(SIZES, SEEDS, st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]))
def test_a_global_batch_is_the_same_for_every_world_size(sizes: list[int], seed: int, b: int, world: int) -> None:
    whole = records(Order(sizes, seed, 8), b * 8 + np.arange(8))
    parts = [records(Order(sizes, seed, 8), b * 8 + rank * 8 // world + np.arange(8 // world)) for rank in range(world)]
    assert [place for part in parts for place in part] == whole


def test_any_subset_in_any_order_is_located_alike() -> None:
    numbers = np.arange(5000)
    order = Order([100, 7, 0, 250, 33], 5, 4)
    places = order.locate(numbers)
    rng = np.random.default_rng(0)
    some = rng.permutation(numbers)[:300]
    again = Order([100, 7, 0, 250, 33], 5, 4).locate(some)
    assert (again.shard == places.shard[some]).all()
    assert (again.row == places.row[some]).all()
    assert (again.epoch == places.epoch[some]).all()


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    order = Order([500, 500], 0, 10)
    first, second = records(order, np.arange(1000)), records(order, 1000 + np.arange(1000))
    other = records(Order([500, 500], 1, 10), np.arange(1000))
    same = [np.mean([a == b for a, b in zip(first, rest, strict=True)]) for rest in (second, other)]
    assert max(same) < 0.02


def test_neighbours_come_from_far_apart() -> None:
    """Within a window of 8 shards of 1,000: the distance of neighbours in the source is that of a random permutation
    (a third of the window), and positions are not correlated from one sample to the next."""
    order = Order([1000] * 8, 3, 100)
    places = order.locate(np.arange(8000))
    rank_in_window = np.argsort(np.argsort(places.shard * 1000 + places.row))
    distance = np.abs(np.diff(rank_in_window))
    assert abs(distance.mean() / 8000 - 1 / 3) < 0.01
    centred = rank_in_window - rank_in_window.mean()
    correlation = (centred[1:] * centred[:-1]).mean() / centred.var()
    assert abs(correlation) < 0.04
    counts = np.stack([np.bincount(chunk, minlength=8) for chunk in places.shard.reshape(80, 100)])
    assert counts.min() >= 1  # every batch of 100 holds all eight shards


def test_windows_are_even_and_a_reader_holds_only_one() -> None:
    order = Order([10] * 17, 0, 10, window=8)
    assert order.largest_window([100] * 17) == 600
    places = order.locate(np.arange(170))
    assert len(set(places.shard[:50].tolist())) == 5  # 17 shards in three windows: 5, 6, 6
    assert len(set(places.shard[50:110].tolist())) == 6


def test_starting_far_away_in_a_large_dataset_is_quick_and_exact() -> None:
    order = Order([10_000] * 20_000, 9, 4096)
    n = 3 * order.epoch_samples + 123_456_789
    places = order.locate(np.arange(n, n + 4096))
    assert set(places.epoch.tolist()) == {3}
    assert len(set(zip(places.shard.tolist(), places.row.tolist(), strict=True))) == 4096


@pytest.mark.parametrize(("sizes", "tail"), [([3], "drop"), ([], "wrap"), ([8], "pad")])
def test_impossible_orders_are_refused(sizes: list[int], tail: str) -> None:
    with pytest.raises(ConfigError):
        Order(sizes, 0, 4, tail)


def test_the_order_is_what_it_was_when_it_was_published() -> None:
    """A change would change the data of every run that resumes: these values are part of the format."""
    places = Order([5, 3, 4], 7, 4).locate(np.arange(12))
    assert places.shard.tolist() == [2, 2, 1, 2, 0, 1, 2, 0, 0, 1, 0, 0]
    assert places.row.tolist() == [0, 2, 1, 3, 3, 2, 1, 0, 2, 0, 4, 1]
