"""States of open_dataset: loaders of PyTorch and of torchdata go on exactly, also in another world."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from latentmill import CacheDataset, LatentmillError, open_dataset
from made.cache import make_cache, record, write_unit
from made.columns import make_columns
from made.looped import BATCH, SEED, STEPS, first, require_same
from pipeline.data.format.manifest import commit_manifest, load_manifest
from pipeline.errors import ConfigError
from pipeline.storage.urls import open_storage

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("loops") / "cache")
    make_cache(url, [20, 17, 9])
    return url


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_workers_gives_the_same_batches_in_order(cache: str, workers: int) -> None:
    dataset = open_dataset(cache, batch=BATCH, seed=SEED, captions=True)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    batches = first(loader)
    require_same(batches, first(dataset))
    assert len({key for batch in batches[:5] for key in batch["key"]}) == 5 * BATCH, "a record twice in an epoch"


def test_a_pickled_dataset_is_the_same(cache: str) -> None:
    dataset = open_dataset(cache, batch=BATCH, seed=SEED, start=16)
    require_same(first(pickle.loads(pickle.dumps(dataset))), first(dataset))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_workers_of_a_plain_loader_have_a_place_that_the_dataset_does_not_tell(cache: str, context: str) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(cache, batch=BATCH, seed=SEED)))
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context)
    begin = dataset.state_dict()
    for go_on in (lambda: dataset.load_state_dict(begin), lambda: first(dataset, 1)):
        require_same(first(loader, 2), first(open_dataset(cache, batch=BATCH, seed=SEED), 2))
        with pytest.raises(ConfigError, match=r"workers of a DataLoader read this dataset, .* StatefulDataLoader"):
            dataset.state_dict()
        go_on()
        dataset.state_dict()
    assert dataset.state_dict() == begin | {"n": BATCH}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_exactly_after_any_number_of_batches(cache: str, workers: int) -> None:
    def loader() -> StatefulDataLoader[dict[str, Any]]:
        dataset = open_dataset(cache, batch=BATCH, seed=SEED)
        return StatefulDataLoader(dataset, batch_size=None, num_workers=workers)

    running, undisturbed = loader(), list[dict[str, Any]]()
    states = [running.state_dict()]
    for batch in itertools.islice(running, STEPS):
        undisturbed.append(batch)
        states.append(running.state_dict())
    for done in (0, 1, 2, 5):
        resumed = loader()
        resumed.load_state_dict(states[done])
        require_same(first(resumed, STEPS - done), undisturbed[done:])


def test_any_world_and_any_workers_go_on_from_a_state(cache: str) -> None:
    """After five batches of two ranks; rank 1's state, which is that of rank 0."""
    whole = first(open_dataset(cache, batch=BATCH, seed=SEED))
    stopped = [open_dataset(cache, batch=BATCH, seed=SEED, rank=rank, world=2) for rank in range(2)]
    for dataset in stopped:
        first(dataset, 5)
    states = [dataset.state_dict() for dataset in stopped]
    assert states[0] == states[1] == json.loads(json.dumps(states[0]))
    for world, workers in ((1, 0), (4, 0), (1, 2)):
        ranks = []
        for rank in range(world):
            dataset = open_dataset(cache, batch=BATCH, seed=SEED, rank=rank, world=world)
            dataset.load_state_dict(states[1])
            ranks.append(first(DataLoader(dataset, batch_size=None, num_workers=workers), 3))
        for step in range(3):
            assert torch.equal(torch.cat([of[step]["latents"] for of in ranks]), whole[5 + step]["latents"])


def test_the_samples_seen_are_where_a_loop_without_states_goes_on(cache: str) -> None:
    whole = first(open_dataset(cache, batch=BATCH, seed=SEED))
    require_same(first(open_dataset(cache, batch=BATCH, seed=SEED, start=int(whole[4]["seen"])), 3), whole[5:])


def test_each_iteration_begins_where_the_dataset_was_opened(cache: str) -> None:
    dataset = open_dataset(cache, batch=BATCH, start=24)
    for _ in range(2):
        assert [int(batch["seen"]) for batch in first(dataset, 2)] == [32, 40]
    assert dataset.state_dict()["n"] == 40
    old = iter(dataset)
    next(old)
    dataset.load_state_dict(dataset.state_dict() | {"n": 64})
    next(old)
    assert dataset.state_dict()["n"] == 64, "an iteration that was left has moved the dataset"


@pytest.fixture
def grown(tmp_path: Path) -> tuple[str, Callable[[], None]]:
    """A cache, and what appends a shard to it."""
    url = str(tmp_path / "grown")
    before, storage = make_cache(url, [20, 17]), open_storage(url)

    def grow() -> None:
        shard, unit = write_unit(storage, 2, (16, 16), [record(2, row) for row in range(9)], {})
        shards, units = (*before.shards, shard), (*before.units, unit)
        commit_manifest(storage, dataclasses.replace(before, version=2, shards=shards, units=units))

    return url, grow


def test_a_cache_that_has_grown_is_read_in_the_version_of_the_state(grown: tuple[str, Callable[[], None]]) -> None:
    url, grow = grown
    dataset = open_dataset(url, batch=BATCH, seed=SEED)
    undisturbed = first(dataset, 10)
    first(dataset, 3)
    state = dataset.state_dict()
    grow()
    resumed = open_dataset(url, batch=BATCH, seed=SEED)
    assert (dataset.records, resumed.records) == (37, 46)
    resumed.load_state_dict(state)
    assert resumed.records == 37
    require_same(first(resumed, 7), undisturbed[3:])


def test_a_state_that_is_refused_leaves_the_dataset_as_it_was(grown: tuple[str, Callable[[], None]]) -> None:
    url, grow = grown
    before = open_dataset(url, batch=BATCH, seed=SEED)
    undisturbed = first(before, 6)
    first(before, 3)
    state = before.state_dict()
    grow()
    dataset = open_dataset(url, batch=BATCH, seed=SEED)
    begin = dataset.state_dict()
    for change in ({"manifests": ["0" * 64]}, {"seed": 8}, {"n": 12}):
        with pytest.raises(LatentmillError):
            dataset.load_state_dict(state | change)
        assert (dataset.records, dataset.state_dict()) == (46, begin)
    dataset.load_state_dict(state)
    assert dataset.records == 37
    require_same(first(dataset, 3), undisturbed[3:])


def test_a_cache_that_has_grown_goes_on_with_the_columns_of_the_state(
    grown: tuple[str, Callable[[], None]], tmp_path: Path
) -> None:
    url, grow = grown

    def opened() -> CacheDataset:
        return open_dataset(url, batch=BATCH, seed=SEED, columns=[tmp_path / "columns"])

    make_columns(str(tmp_path / "columns"), load_manifest(open_storage(url)))
    dataset = opened()
    undisturbed = first(dataset, 6)
    first(dataset, 3)
    grow()
    make_columns(str(tmp_path / "columns"), load_manifest(open_storage(url)))
    resumed = opened()
    assert resumed.state_dict()["columns"] != dataset.state_dict()["columns"]
    resumed.load_state_dict(dataset.state_dict())
    require_same(first(resumed, 3), undisturbed[3:])


@pytest.fixture
def state(cache: str) -> dict[str, Any]:
    return open_dataset(cache, batch=BATCH, seed=SEED).state_dict()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"seed": 8}, {}, r"of another order: seed was 7 and is 8; open the dataset with the former values"),
        ({"batch": 4}, {}, r"batch was 8 and is 4"),
        ({}, {"order": 2}, r"order was 2 and is \d"),
        ({}, {"manifests": ["0" * 64]}, r"no version whose manifest is 000000000000, which the state is of"),
        ({}, {"manifests": ["0" * 64, "1" * 64]}, r"the state is of 2 caches, and 1 are open"),
        ({}, {"n": 12}, r"start=12"),
        ({}, {"n": None}, "this is no state of a latentmill dataset"),
        ({}, {"worker": 1, "workers": 2}, r"worker 1 of 2, and this is worker 0 of 1: give the loader the former num_"),
    ],
)
def test_a_state_of_something_else_is_refused(
    cache: str, state: dict[str, Any], options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    def go_on(dataset: CacheDataset) -> None:
        dataset.load_state_dict(state | change)
        iter(dataset)

    with pytest.raises(LatentmillError, match=message):
        go_on(open_dataset(cache, **({"batch": BATCH, "seed": SEED} | options)))
