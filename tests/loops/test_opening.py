"""Caches that are opened together fit each other, and messages name the parameters of open_dataset."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from latentmill import as_webdataset, open_dataset
from made.cache import make_cache
from made.looped import BATCH
from pipeline.conditions.facts import Conditions, LabelFacts
from pipeline.data.format.manifest import commit_manifest
from pipeline.data.reading.stream import Stream
from pipeline.errors import ConfigError, ContractMismatch, StorageError
from pipeline.loops.opening import as_parameters
from pipeline.storage.urls import open_storage


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opening") / "cache"
    make_cache(str(folder), [20, 17, 9])
    return folder


def make_other(folder: Path, **changes: Any) -> Path:
    """Writes a cache whose contract differs in `changes`."""
    manifest = make_cache(str(folder), [6, 3, 14])
    contract = dataclasses.replace(manifest.contract, **changes)
    commit_manifest(open_storage(str(folder)), dataclasses.replace(manifest, version=2, contract=contract))
    return folder


def test_conditions_that_are_read_mean_the_same_in_all_caches(cache: Path, tmp_path: Path) -> None:
    other = make_other(tmp_path / "other", conditions=Conditions(labels=LabelFacts(count=100, grid=8)))
    with pytest.raises(
        ContractMismatch, match=r"other has labels made otherwise than the first cache, .*: count=100, not 256"
    ):
        open_dataset([cache, other], batch=BATCH)
    assert open_dataset([cache, other], batch=BATCH, members=("latents", "text")).records == 46 + 23


def test_what_latents_are_drawn_from_has_one_dtype_in_all_caches(cache: Path, tmp_path: Path) -> None:
    moments, *others = make_cache(str(tmp_path / "made"), [1]).contract.members
    other = make_other(tmp_path / "other", members=(dataclasses.replace(moments, dtype="float32"), *others))
    with pytest.raises(ContractMismatch, match="other holds moments as float32, not float16 as the first cache does"):
        open_dataset([cache, other], batch=BATCH, members=("latents",))
    assert open_dataset([cache, other], batch=BATCH, members=("text",)).records == 46 + 23


@pytest.mark.parametrize("name", ["members", "columns"])
def test_one_name_in_place_of_a_list_is_refused(cache: Path, name: str) -> None:
    given: dict[str, Any] = {name: "text"}
    for opened in (lambda: open_dataset(cache, batch=BATCH, **given), lambda: as_webdataset(cache, **given)):
        with pytest.raises(ConfigError, match=rf"{name}='text' is one name: give a list, {name}=\['text'\]"):
            opened()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_no_positive_number_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="a positive number for each of the 2 caches"):
        open_dataset(["a", "b"], batch=BATCH, weights=(1.0, weight))


def test_messages_name_parameters_in_place_of_keys(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stream: Stream) -> None:
        raise StorageError("data.cache=kept/data.cache is full: set data.cache_gb, or leave it out of data.mix")

    monkeypatch.setattr(Stream, "__next__", fail)
    with pytest.raises(StorageError, match=r"^cache=kept/data\.cache is full: set cache_gb, or leave it out of url$"):
        next(iter(open_dataset(cache, batch=BATCH)))
    with pytest.raises(ConfigError, match=r"^leave it out of url$"), as_parameters():
        raise ConfigError("leave it out of data.train and data.mix")


def test_processes_that_mpi_has_started_do_not_all_read_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    for opened in (lambda: open_dataset(cache, batch=BATCH), lambda: as_webdataset(cache)):
        with pytest.raises(ConfigError, match="MPI has started 2 processes, and RANK and WORLD_SIZE do not say which"):
            opened()
    assert open_dataset(cache, batch=BATCH, rank=1, world=2).records == 46
