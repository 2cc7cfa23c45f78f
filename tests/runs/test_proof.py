"""runs/proof.py: orders with excluded records, with buckets, and with records that come twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.format.kept import KeptRecords
from pipeline.data.format.manifest import Manifest
from pipeline.data.order.blocks import Blocks
from pipeline.data.order.dataset import Dataset, Part
from pipeline.runs.ledger import Stretch, record_hashes
from pipeline.runs.proof import prove

BATCH = 8


def manifest_of(sizes: list[int], buckets: int = 1) -> Manifest:
    shards = [SimpleNamespace(name="", samples=n, bytes=1000 * n, size=(i % buckets, 1)) for i, n in enumerate(sizes)]
    contract = SimpleNamespace(buckets=tuple((i, 1) for i in range(buckets)))
    return SimpleNamespace(shards=shards, contract=contract, columns=())  # type: ignore[return-value]


def dataset(sizes: list[int], excluded: list[list[int]] | np.ndarray, buckets: int = 1, size: int = 10**6) -> Dataset:
    manifest = manifest_of(sizes, buckets)
    gone = np.array(excluded, dtype=np.int32).reshape(-1, 2)
    return Dataset([Part(None, manifest, Blocks(manifest, KeptRecords(manifest, gone), size))])  # type: ignore[arg-type]


@st.composite
def datasets(draw: st.DrawFn) -> tuple[list[int], np.ndarray]:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    rows = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    gone = draw(st.lists(st.sampled_from(rows), unique=True, max_size=len(rows) // 2))
    return sizes, np.array(sorted(gone), dtype=np.int32).reshape(-1, 2)


@given(datasets(), st.sampled_from([1500, 4000, 10**6]))
@settings(max_examples=80, deadline=None)
def test_places_are_the_rows_that_blocks_are_read_from_and_never_excluded_ones(
    drawn: tuple[list[int], np.ndarray], block_bytes: int
) -> None:
    sizes, excluded = drawn
    blocks = dataset(sizes, excluded, size=block_bytes)
    found: list[tuple[int, int]] = []
    for number in range(len(blocks)):
        rows = blocks.rows(number)
        shards, mine = blocks.records_at(np.full(len(rows), number), np.arange(len(rows)))
        assert mine.tolist() == rows.tolist()
        found += zip(shards.tolist(), mine.tolist())
    gone = set(map(tuple, excluded.tolist()))
    assert found == [(s, r) for s, size in enumerate(sizes) for r in range(size) if (s, r) not in gone]


def lines_of(numbers: np.ndarray, shards: np.ndarray, rows: np.ndarray, world: int) -> Iterator[Stretch]:
    share = record_hashes(numbers, shards, rows).reshape(-1, world, BATCH // world)
    for rank in range(world):
        samples = share[:, rank].size
        yield Stretch(0, len(numbers), rank, world, samples, int(share[:, rank].sum()), 0)


@pytest.mark.parametrize(("buckets", "tail"), [(1, "drop"), (1, "wrap"), (3, "drop"), (3, "wrap")])
def test_epochs_are_proved_with_what_they_leave_out_or_repeat(buckets: int, tail: str) -> None:
    sizes = [31, 17, 40, 23, 11, 37]
    blocks = dataset(sizes, [[0, 4], [2, 7], [2, 8]], buckets, 5000)
    order = blocks.parts[0].blocks.order(1, BATCH, tail)
    numbers = np.arange(2 * order.epoch_samples + 5 * BATCH)
    found = order.locate(numbers)
    lines = list(lines_of(numbers, *blocks.records_at(found.block, found.place), 4))
    proof = prove(lines, len(numbers), order, blocks)
    assert proof.problems == []
    assert [(e.number, e.samples, e.whole) for e in proof.epochs] == [
        (0, order.epoch_samples, True),
        (1, order.epoch_samples, True),
        (2, 5 * BATCH, False),
    ]
    for epoch in proof.epochs[:2]:
        assert epoch.samples - epoch.used == order.repeated
        assert order.records - epoch.used == order.dropped
    assert order.records == sum(sizes) - 3
    assert order.repeated > 0 if tail == "wrap" else order.dropped > 0


def test_an_order_that_repeats_a_record_within_an_epoch_is_no_proof() -> None:
    blocks = dataset([20, 20], [])
    order = blocks.parts[0].blocks.order(1, BATCH)
    real = order.locate

    def locate(n: np.ndarray) -> object:
        found = real(n)
        return dataclasses.replace(found, block=found.block * 0)

    order.locate = locate  # type: ignore[assignment,method-assign]
    numbers = np.arange(order.epoch_samples)
    found = order.locate(numbers)
    lines = list(lines_of(numbers, *blocks.records_at(found.block, found.place), 1))
    (problem,) = prove(lines, len(numbers), order, blocks).problems
    assert problem == "epoch 0 takes 20 records twice, and its order says 0"


def test_a_gap_between_spans_that_lack_one_rank_is_reported_too() -> None:
    blocks = dataset([40, 40], [])
    lines = [Stretch(first, first + 8, 0, 2, 4, 0, 0) for first in (0, 8, 24, 32)]
    found = prove(lines, 40, blocks.order(1, BATCH), blocks).problems
    assert [problem.partition(" (")[0] for problem in found] == [
        "samples 0 to 15: nothing of rank 1 of 2",
        "samples 16 to 23 are in no rank's ledger",
        "samples 24 to 39: nothing of rank 1 of 2",
    ]
