"""data/order/shuffle.py: every record comes once per epoch, for any rank and from any start, and well mixed."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.shuffle import Order
from pipeline.errors import ConfigError

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda sizes: sum(sizes) >= 8)
SEEDS = st.integers(0, 2**64 - 1)


def records(order: Order, numbers: np.ndarray) -> list[tuple[int, int]]:
    places = order.locate(numbers)
    return list(zip(places.block.tolist(), places.place.tolist(), strict=True))


def make(data: st.DataObject, tail: str) -> Order | None:
    """Any order that a dataset, a batch and their lanes allow; None if the dataset is too small."""
    sizes = data.draw(SIZES)
    shards = np.sort(np.array(data.draw(st.lists(st.integers(0, 6), min_size=len(sizes), max_size=len(sizes)))))
    batch = data.draw(st.integers(1, 12))
    lanes = data.draw(st.sampled_from([lanes for lanes in range(1, batch + 1) if batch % lanes == 0]))
    window, group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    try:
        return Order(sizes, data.draw(SEEDS), batch, tail, block_shards=shards, lanes=lanes, window=window, group=group)
    except ConfigError:
        return None


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 1000))
def test_an_epoch_sees_each_record_at_most_once_and_all_but_the_tail(data: st.DataObject, epoch: int) -> None:
    order = make(data, "drop")
    if order is None:
        return
    seen = records(order, epoch * order.epoch_samples + np.arange(order.epoch_samples))
    there = {(block, place) for block, size in enumerate(order.sizes.tolist()) for place in range(size)}
    assert len(seen) == len(set(seen)) == order.records - order.dropped
    assert set(seen) <= there
    assert order.epoch_samples % order.batch == 0
    assert order.dropped < order.batch + order.lanes


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_wrap_sees_every_record_and_repeats_only_what_fills_the_last_batches(data: st.DataObject) -> None:
    order = make(data, "wrap")
    if order is None:
        return
    seen = records(order, 3 * order.epoch_samples + np.arange(order.epoch_samples))
    assert order.epoch_samples % order.batch == 0
    assert len(set(seen)) == order.records
    assert len(seen) - len(set(seen)) == order.repeated < order.batch + order.lanes


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 50))
def test_a_batch_takes_an_equal_share_from_each_lane_in_the_order_of_the_lanes(data: st.DataObject, b: int) -> None:
    order = make(data, "drop")
    if order is None:
        return
    b %= order.epoch_samples // order.batch
    table = order._table(0)
    places = order.locate(b * order.batch + np.arange(order.batch))
    position = {int(block): i for i, block in enumerate(table.blocks)}
    at = [int(table.ends[position[k]] - order.sizes[k]) + p for k, p in zip(places.block.tolist(), places.place)]
    lanes = np.searchsorted(order._starts, at, side="right") - 1
    assert lanes.tolist() == np.repeat(np.arange(order.lanes), order.share).tolist()


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
    assert (again.block == places.block[some]).all()
    assert (again.place == places.place[some]).all()
    assert (again.epoch == places.epoch[some]).all()


def test_threads_may_locate_in_one_order_at_once() -> None:
    """The readers are in different epochs, so that each needs its own tables."""
    order, failures = Order([3, 5, 4, 6], 0, 6), []
    expected = {first: order.locate(np.arange(first, first + 18)) for first in range(0, 1800, 18)}

    def read(start: int) -> None:
        try:
            for first in [*range(start, 1800, 18), *range(0, start, 18)]:
                assert np.array_equal(order.locate(np.arange(first, first + 18)).block, expected[first].block)
        except BaseException as error:
            failures.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=read, args=(450 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failures == []


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    order = Order([500, 500], 0, 10)
    first, second = records(order, np.arange(1000)), records(order, 1000 + np.arange(1000))
    other = records(Order([500, 500], 1, 10), np.arange(1000))
    same = [np.mean([a == b for a, b in zip(first, rest, strict=True)]) for rest in (second, other)]
    assert max(same) < 0.02


def test_neighbours_come_from_far_apart() -> None:
    """400 shards of 5 blocks of 50 records, batches of 256 over 64 lanes. The measure: the distance in the source
    (shard, then row) of two samples that are neighbours in a batch, or consecutive in a lane, as a fraction
    of the dataset (a random permutation: 0.33; 0.25 where one in four shares a block); and the correlation of source
    positions from lane to lane."""
    order = Order([50] * 2000, 3, 256, block_shards=np.repeat(np.arange(400), 5))
    assert order.lanes == 64
    places = order.locate(np.arange(order.epoch_samples))
    source = (places.block * 50 + places.place).reshape(-1, 256).astype(float)
    assert np.abs(np.diff(source, axis=1)).mean() / order.records > 0.22
    assert np.abs(np.diff(source, axis=0)).mean() / order.records > 0.22
    across = source[:, :: order.share].reshape(-1)
    across -= across.mean()
    assert abs((across[1:] * across[:-1]).mean() / across.var()) < 0.03


@pytest.mark.parametrize(("nodes", "most"), [(1, 1.0), (2, 1.02), (4, 1.02), (32, 1.02), (3, 1.1), (5, 2.0), (7, 2.0)])
def test_all_nodes_together_read_the_dataset_about_once_an_epoch(nodes: int, most: float) -> None:
    """Both nodes read a block that a border between lanes cuts; if nodes do not divide the lanes, two read some
    lanes."""
    batch = 64 * 105
    order = Order([50] * 4000, 9, batch, block_shards=np.repeat(np.arange(400), 10), lanes=32)
    places = order.locate(np.arange(order.epoch_samples))
    node = np.arange(order.epoch_samples) % batch * nodes // batch
    read = sum(len(np.unique(places.block[node == number])) for number in range(nodes))
    assert read / 4000 <= most


def test_a_reader_needs_few_shards_at_a_time() -> None:
    """So it keeps few indexes: 2,000 consecutive samples of a lane are in few more shards than a group has."""
    order = Order([50] * 4000, 9, 64, block_shards=np.repeat(np.arange(400), 10), lanes=1)
    places = order.locate(np.arange(2000))
    assert len(np.unique(places.block // 10)) <= 2 * 8


def test_a_reader_holds_a_window_of_blocks_of_each_of_its_lanes() -> None:
    order = Order([10] * 64, 0, 16, window=4)
    assert order.lanes == 16
    assert order.window_bytes([100] * 64, 0, 2) <= 2 * 6 * 100
    assert order.window_bytes([100] * 64, 0, 16) == 64 * 100
    places = order.locate(np.arange(order.epoch_samples))
    ours = places.block.reshape(-1, 16)[:, :2]
    for step in range(len(ours)):
        later = {block for row in ours[step:] for block in row.tolist()}
        open_now = {block for row in ours[: step + 1] for block in row.tolist()} & later
        assert len(open_now) <= 2 * 6


def test_starting_far_away_in_a_large_dataset_is_quick_and_exact() -> None:
    order = Order([2_000] * 100_000, 9, 4096, block_shards=np.repeat(np.arange(20_000), 5))
    n = 3 * order.epoch_samples + 123_456_789
    places = order.locate(np.arange(n, n + 4096))
    assert set(places.epoch.tolist()) == {3}
    assert len(set(zip(places.block.tolist(), places.place.tolist(), strict=True))) == 4096


@pytest.mark.parametrize(("sizes", "tail"), [([3], "drop"), ([], "wrap"), ([8], "pad")])
def test_impossible_orders_are_refused(sizes: list[int], tail: str) -> None:
    with pytest.raises(ConfigError):
        Order(sizes, 0, 4, tail)


def test_the_order_is_what_it_was_when_it_was_published() -> None:
    """Other values would change the data of every resumed run: these are part of the format."""
    places = Order([5, 3, 4], 7, 4).locate(np.arange(12))
    assert places.block.tolist() == [2, 2, 2, 2, 0, 0, 1, 1, 0, 1, 0, 0]
    assert places.place.tolist() == [2, 0, 3, 1, 4, 3, 1, 2, 2, 0, 0, 1]
    order = Order([5, 3, 4, 6, 2, 9], 7, 4, block_shards=[0, 0, 1, 2, 2, 2], lanes=2, window=2, group=2)
    places = order.locate(28 + np.arange(12))
    assert places.block.tolist() == [2, 0, 5, 3, 0, 0, 5, 5, 0, 2, 3, 3]
    assert places.place.tolist() == [1, 4, 3, 3, 1, 0, 1, 2, 2, 0, 4, 2]


def test_large_batches_have_lanes_for_as_many_nodes_as_train_on_them() -> None:
    sizes = [100] * 4096
    assert Order(sizes, 0, 512).lanes == 64
    many = Order(sizes, 0, 16_384)
    assert many.lanes == 512
    node = np.arange(16_384) * 256 // 16_384  # of 256 nodes, each reads lanes of its own
    reads = set()
    for b in range(many.epoch_samples // 16_384):
        block = many.locate(np.arange(b * 16_384, (b + 1) * 16_384)).block
        reads |= set(zip(node.tolist(), block.tolist(), strict=True))
    assert len(reads) <= 1.1 * len(sizes)
