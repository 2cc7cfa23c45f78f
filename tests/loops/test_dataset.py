"""open_dataset: one rank's batches in the exact order of training, whoever iterates, and exactly on from a state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentmill import LatentmillError, open_dataset
from made.cache import make_cache, record
from made.captioned import SEVERAL, make_captioned
from made.columns import make_columns
from made.looped import BATCH, SEED, STEPS, first, require_same
from made.model import MODEL
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    LaunchConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import ConfigError, DatasetError, ShardCorrupt
from pipeline.storage.urls import open_storage
from pipeline.training.objectives.diffusion import DiffusionObjective


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("loops") / "cache")
    make_cache(url, [20, 17, 9])
    return url


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("loops") / "other")
    make_cache(url, [6, 3, 14])
    return url


# --------------------------------------------------------------------------------------------------------------------
# The order of training


def trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: DataConfig) -> list[dict[str, Any]]:
    """What a real run is trained on."""
    config = TrainConfig(
        run=str(tmp_path / "run"),
        data=data,
        model=MODEL,
        optim=OptimConfig(batch=BATCH),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=1000),
        tracking=TrackingConfig(wandb="off"),
        samples=STEPS * BATCH,
        seed=SEED,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )
    prepare, seen = DiffusionObjective.prepare, list[dict[str, Any]]()

    def recorded(self: DiffusionObjective, batch: Any) -> Any:
        prepared = prepare(self, batch)
        chosen = {} if batch.chosen is None else {"chosen": batch.chosen}
        seen.append(
            {
                "n": batch.numbers,
                "seen": torch.tensor(batch.n + BATCH),
                "latents": prepared.images.clone(),
                "text": batch.tensors["text"].clone(),
                **chosen,
                "key": batch.keys,
                "caption": batch.captions,
            }
        )
        return prepared

    monkeypatch.setattr(DiffusionObjective, "prepare", recorded)
    assert train.main(config) == 0
    return seen


@pytest.mark.parametrize("kind", ["one cache", "a mixture", "several captions"])
def test_sample_n_is_the_record_the_caption_and_the_latent_that_a_run_is_trained_on(
    kind: str, cache: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, weights = [cache], tuple[float, ...]()
    if kind == "a mixture":
        urls, weights = [cache, other], (2.0, 1.0)
    if kind == "several captions":
        urls = [str(tmp_path / "captioned")]
        make_captioned(urls[0], dataclasses.replace(SEVERAL, storage="full"), [20, 17, 9])
    seen = trained_on(monkeypatch, tmp_path, DataConfig(train=urls[0], mix=tuple(urls[1:]), weights=weights))
    dataset = open_dataset(
        urls, batch=BATCH, seed=SEED, weights=weights, members=("latents", "text"), captions=True, samples=len(seen) * 8
    )
    require_same(list(dataset), seen)
    assert len(seen) == STEPS


def test_another_seed_has_another_order_and_other_noise(cache: str) -> None:
    one, another = (first(open_dataset(cache, batch=BATCH, seed=seed, captions=True)) for seed in (7, 8))
    assert [batch["key"] for batch in one] != [batch["key"] for batch in another]
    raw = open_dataset(cache, batch=BATCH, seed=7, sampled=False, members=("moments",))
    mean = next(iter(raw))["moments"].float().chunk(2, dim=1)[0]
    assert not torch.equal((mean - 0.25) * 0.5, one[0]["latents"])


def test_raw_arrays_are_the_stored_ones(cache: str) -> None:
    dataset = open_dataset(cache, batch=BATCH, seed=SEED, sampled=False, captions=True)
    for batch in first(dataset, 3):
        assert {name for name in batch if name not in ("n", "seen", "key", "caption")} == {
            *("moments", "text", "cond.labels")
        }
        for i, key in enumerate(batch["key"]):
            stored = record(*(int(part) for part in key.split("_")))
            assert batch["caption"][i] == stored.meta["caption"]
            for name, array in stored.members.items():
                assert batch[name].dtype == torch.from_numpy(array).dtype
                assert np.array_equal(batch[name][i].numpy(), array)


def test_ranks_share_each_global_batch_and_any_world_reads_the_same(cache: str) -> None:
    whole = first(open_dataset(cache, batch=BATCH, seed=SEED))
    for world in (2, 4):
        ranks = [first(open_dataset(cache, batch=BATCH, seed=SEED, rank=r, world=world)) for r in range(world)]
        for step, batch in enumerate(whole):
            for name in ("n", "latents", "text"):
                assert torch.equal(torch.cat([of[step][name] for of in ranks]), batch[name])


def test_the_place_is_the_launchers_where_none_is_given(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert next(iter(open_dataset(cache, batch=BATCH)))["n"].tolist() == [4, 5, 6, 7]
    assert next(iter(open_dataset(cache, batch=BATCH, rank=0, world=1)))["n"].tolist() == list(range(8))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert next(iter(open_dataset(cache, batch=BATCH)))["n"].tolist() == list(range(8))
    finally:
        torch.distributed.destroy_process_group()


def test_an_iteration_ends_at_the_samples_that_are_asked_for(cache: str) -> None:
    dataset = open_dataset(cache, batch=BATCH, start=16, samples=43)
    assert [int(batch["seen"]) for batch in dataset] == [24, 32, 40, 48]
    assert list(open_dataset(cache, batch=BATCH, start=48, samples=43)) == []
    loader = DataLoader(dataset, batch_size=None, num_workers=5)
    assert [int(batch["seen"]) for batch in loader] == [24, 32, 40, 48]


def test_what_a_network_is_built_from_is_at_hand(cache: str) -> None:
    dataset = open_dataset(cache, batch=BATCH)
    assert (dataset.contract.latent_shape, dataset.contract.scale, dataset.records) == ((4, 2, 2), 0.5, 46)
    assert dataset.empty is not None
    assert (dataset.empty.shape, dataset.empty.dtype) == ((3, 8), torch.float32)


@pytest.mark.parametrize("storages", [("full",), ("tokens",), ("full", "of one")])
def test_the_caption_that_a_sample_sees_comes_without_its_text_too(storages: tuple[Any, ...], tmp_path: Path) -> None:
    """The last is a mixture with a cache whose records have one caption."""
    text = dataclasses.replace(SEVERAL, storage=storages[0])
    urls = [tmp_path / name for name in storages]
    for number, url in enumerate(urls):
        make_captioned(str(url), text.of_one if number else text, [20, 5 + number])
    array = "tokens" if storages[0] == "tokens" else "text"
    whole, alone = (
        first(open_dataset(urls, batch=BATCH, seed=SEED, captions=True, members=members))
        for members in (("latents", array), ("latents",))
    )
    for batch, other in zip(whole, alone, strict=True):
        assert batch.keys() - other.keys() == {array}
        assert batch["caption"] == other["caption"]
        assert torch.equal(batch["chosen"], other["chosen"])
    assert any(batch["chosen"].any() for batch in alone)


def test_blocks_are_kept_in_the_folder_that_is_named(cache: str, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    dataset = open_dataset(cache, batch=BATCH, seed=SEED, cache=folder)
    for _ in range(2):
        require_same(first(dataset), first(open_dataset(cache, batch=BATCH, seed=SEED)))
        assert list(folder.iterdir())


def test_excluded_records_never_come(tmp_path: Path) -> None:
    from made.forged_cache import forge_excluded
    from pipeline.data.format.records import npy_bytes

    make_cache(str(tmp_path), [12, 12])
    forge_excluded(tmp_path, npy_bytes(np.array([[0, 3], [1, 7]], dtype=np.int32)))
    storage = open_storage(str(tmp_path))
    assert len(load_excluded(storage, load_manifest(storage))) == 2
    dataset = open_dataset(str(tmp_path), batch=2, captions=True)
    keys = {key for batch in first(dataset, 33) for key in batch["key"]}
    assert dataset.records == len(keys) == 22
    assert not {"000000_000003", "000001_000007"} & keys


def test_columns_are_arrays_of_their_records(cache: str, tmp_path: Path) -> None:
    columns = make_columns(str(tmp_path), load_manifest(open_storage(cache)), without=[(0, 5)])
    plain = open_dataset(cache, batch=2, captions=True)
    dataset = open_dataset(cache, batch=2, captions=True, columns=[str(tmp_path)])
    assert (plain.records, dataset.records) == (46, 45)
    batch = next(iter(dataset))
    assert (
        batch.keys() - next(iter(plain)).keys()
        == {"tokens", "column.extra"}
        == {m.name for m in columns.contract.members}
    )
    for key, extra in zip(batch["key"], batch["column.extra"].tolist(), strict=True):
        assert extra == [int(part) for part in key.split("_")]
    with pytest.raises(ConfigError, match="of another order: columns was "):
        plain.load_state_dict(dataset.state_dict())


def test_a_damaged_record_is_an_error_of_the_iteration_in_workers_too(tmp_path: Path) -> None:
    make_cache(str(tmp_path), [8])
    path = tmp_path / "000000.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    dataset = open_dataset(str(tmp_path), batch=BATCH)
    for workers in (0, 1):
        with pytest.raises(ShardCorrupt, match=r"000000\.tar was read twice and is not what the manifest promises"):
            first(DataLoader(dataset, batch_size=None, num_workers=workers))


def test_a_bucket_is_read_by_workers_too(s3: str, cache: str) -> None:
    from ranks.faulty_run import upload

    upload(cache, f"{s3}/cache")
    dataset = open_dataset(f"{s3}/cache", batch=BATCH, seed=SEED)
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    require_same(first(loader, 6), first(open_dataset(cache, batch=BATCH, seed=SEED), 6))


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 9, "rank": 0, "world": 2}, r"batch=9 is the global batch, which 2 ranks share .* a multiple of 2"),
        ({"rank": 1}, "rank and world belong together"),
        ({"rank": 2, "world": 2}, "rank=2 and world=2: ranks are 0 to 1"),
        ({"start": 12}, r"start=12: a global batch begins at a multiple of batch=8; give the `seen` of the last"),
        ({"seed": -1}, r"seed=-1: a whole number from 0"),
        ({"samples": 0}, "samples=0: at least 1, or None"),
        ({"weights": (1.0,)}, "weights are of several caches, and one is named"),
        (
            {"members": ("latents", "cond.mask")},
            r"holds no cond\.mask: its arrays are moments, text, cond\.labels; name",
        ),
        ({"sampled": False, "members": ("latents",)}, "holds no latents: its arrays are"),
        ({"batch": 64}, r"46 records, fewer than one global batch of 64: lower batch, or set tail=wrap"),
        ({"tail": "cut"}, "^tail=cut: choose drop or wrap"),
        ({"device": "gpu"}, "device=gpu: cpu, or cuda for a GPU"),
        ({"columns": ("nowhere",)}, "nowhere"),
    ],
)
def test_values_that_do_not_fit_are_refused_as_the_dataset_is_opened(
    cache: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LatentmillError, match=message):
        open_dataset(cache, **({"batch": BATCH} | options))


def test_a_place_without_a_cache_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"holds no manifest\.json, so it is not a dataset; nothing is there: encode it first"
    ):
        open_dataset(str(tmp_path), batch=BATCH)
    with pytest.raises(ConfigError, match="no cache is named"):
        open_dataset("", batch=BATCH)


def test_a_gpu_is_not_for_workers_and_must_be_there(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    dataset = open_dataset(cache, batch=BATCH, device="cuda:0")
    with pytest.raises(ConfigError, match=r"device=cuda:0, but PyTorch sees no GPU: set device='cpu'"):
        first(dataset)
    monkeypatch.setattr("pipeline.loops.dataset.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    with pytest.raises(ConfigError, match="device=cuda:0 is not for workers of a DataLoader: set num_workers=0"):
        first(dataset)


def test_too_little_memory_names_the_parameter(cache: str) -> None:
    with pytest.raises(ConfigError, match=r"^memory_gb=1e-06 is too small"):
        next(iter(open_dataset(cache, batch=BATCH, memory_gb=1e-6)))


def test_one_cache_twice_and_caches_that_do_not_fit_are_refused(cache: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"are the same dataset .* with a larger weight"):
        open_dataset([cache, cache], batch=BATCH)
    make_captioned(str(tmp_path / "captioned"), SEVERAL, [20])
    with pytest.raises(DatasetError, match="captioned was made differently: text"):
        open_dataset([cache, str(tmp_path / "captioned")], batch=BATCH)
