"""data/order/buckets.py: each batch is of one bucket, each record comes once per epoch, and buckets as often as in the
data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order.buckets import Buckets
from pipeline.errors import ConfigError


def make(data: st.DataObject) -> tuple[Buckets, np.ndarray, np.ndarray] | None:
    """Any order of buckets, with the sizes and buckets of its blocks; None if no bucket fills a batch."""
    count = data.draw(st.integers(1, 40))
    sizes = np.array(data.draw(st.lists(st.integers(0, 30), min_size=count, max_size=count)))
    buckets = np.array(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)))
    shards = np.sort(np.array(data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))))
    seed, batch = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.sampled_from([1, 2, 4, 6, 8]))
    try:
        return Buckets(sizes, buckets, seed, batch, block_shards=shards, window=2), sizes, buckets
    except ConfigError:
        return None


@settings(max_examples=120, deadline=None)
@given(st.data(), st.integers(0, 300))
def test_every_batch_is_of_one_bucket_and_each_record_comes_once_an_epoch(data: st.DataObject, epoch: int) -> None:
    made = make(data)
    if made is None:
        return
    order, sizes, buckets = made
    places = order.locate(epoch * order.epoch_samples + np.arange(order.epoch_samples))
    of_batch = buckets[places.block].reshape(-1, order.batch)
    assert (of_batch == of_batch[:, :1]).all()
    seen = list(zip(places.block.tolist(), places.place.tolist(), strict=True))
    assert len(set(seen)) == len(seen) == sizes.sum() - order.dropped
    assert (places.place < sizes[places.block]).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_buckets_come_as_often_as_their_records_fill_batches(data: st.DataObject) -> None:
    made = make(data)
    if made is None:
        return
    order, sizes, buckets = made
    places = order.locate(np.arange(order.epoch_samples))
    for bucket in np.unique(buckets):
        records = sizes[buckets == bucket].sum()
        came = (buckets[places.block] == bucket).sum()
        assert records - came < 2 * order.batch or came == 0
        assert came <= records
        if came == 0:
            assert records < 2 * order.batch


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 4]))
def test_any_world_and_any_start_give_the_same_batches(data: st.DataObject, world: int) -> None:
    made = make(data)
    if made is None or made[0].batch % world:
        return
    order = made[0]
    numbers = np.arange(3 * order.epoch_samples)
    whole = order.locate(numbers)
    rng = np.random.default_rng(0)
    some = rng.permutation(numbers)[:100]
    again = order.locate(some)
    assert (again.block == whole.block[some]).all()
    assert (again.place == whole.place[some]).all()
    assert (again.epoch == whole.epoch[some]).all()


def test_the_sequence_of_buckets_is_mixed_and_another_each_epoch() -> None:
    order = Buckets(np.full(60, 40), np.repeat([0, 1, 2], 20), 5, 8, block_shards=np.arange(60))
    epoch = order.locate(np.arange(2 * order.epoch_samples)).block.reshape(2, -1, 8)[:, :, 0] // 20
    assert (epoch[0] != epoch[1]).any()
    runs = 1 + (np.diff(epoch[0]) != 0).sum()
    assert runs > 0.5 * len(epoch[0])


def test_a_dataset_without_a_full_batch_in_any_bucket_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer than one global batch"):
        Buckets(np.array([5, 6]), np.array([0, 1]), 0, 8, block_shards=np.array([0, 1]))
