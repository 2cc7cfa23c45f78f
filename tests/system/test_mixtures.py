"""Runs on several datasets: what the stream gives, what the ledger proves, what a resume refuses, what verbs show."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from made import cache as small_cache
from made.cache import make_cache, record
from made.model import MODEL
from pipeline import cli, train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DataVerbConfig,
    DeepSpeedConfig,
    LaunchConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.config.check.verbs import check
from pipeline.config.loading.load import load
from pipeline.data.format.contract import Member
from pipeline.data.format.manifest import Manifest, commit_manifest, load_manifest
from pipeline.data.order.mixture import Mixture
from pipeline.data.reading import stream as stream_module
from pipeline.data.reading.stream import Stream
from pipeline.errors import ConfigError, ContractMismatch, LatentmillError, RunError
from pipeline.ledger import examine
from pipeline.preview import describe, job_of, reads
from pipeline.runs.checkpoint import read_commit
from pipeline.runs.directory import committed, load_run
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage
from ranks.consumed_run import BATCH, END, SIZES, Seen, begin, dataset_of, live

OTHER = [6, 3, 14]  # 23 records
WEIGHTS = (2.0, 1.0)


@pytest.fixture(autouse=True)
def streams_that_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("POLL", 0.005), ("HORIZON_BATCHES", 8), ("PLAN_BATCHES", 8), ("PLAN_SAMPLES", 8)):
        monkeypatch.setattr(stream_module, name, value)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("mixture")
    make_cache(str(folder / "photos"), SIZES)
    make_cache(str(folder / "drawings"), OTHER)
    return str(folder / "photos"), str(folder / "drawings")


def settings_of(folder: Path, caches: tuple[str, ...], **changes: object) -> TrainConfig:
    config = TrainConfig(
        run=str(folder / "run"),
        data=DataConfig(train=caches[0], mix=caches[1:], weights=WEIGHTS),
        model=MODEL,
        optim=OptimConfig(lr=1e-3, warmup=80, batch=BATCH),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=40, keep=5),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=48,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------------
# Stream and ledger


@pytest.mark.parametrize("world", [1, 2])
def test_the_stream_gives_the_records_that_the_mixture_names(
    tmp_path: Path, caches: tuple[str, str], world: int
) -> None:
    dataset = dataset_of(settings_of(tmp_path, caches))
    order = dataset.order(3, BATCH, weights=WEIGHTS)
    share = BATCH // world
    for rank in range(world):
        with Stream(dataset, order, rank=rank, world=world, batch=BATCH, start_n=5 * BATCH) as stream:
            for step in range(5, 25):
                batch = next(stream)
                places = order.locate(step * BATCH + rank * share + np.arange(share))
                shards, rows = dataset.records_at(places.block, places.place)
                assert batch.shards.tolist() == shards.tolist()
                assert batch.rows.tolist() == rows.tolist()
                own = shards - dataset.shard_starts[dataset.part_of(places.block)]
                expected = [record(s, r) for s, r in zip(own.tolist(), rows.tolist(), strict=True)]
                assert batch.keys == [one.key for one in expected]
                assert (batch.tensors["text"].numpy() == np.stack([one.members["text"] for one in expected])).all()


def test_a_mixture_that_is_killed_and_goes_on_on_other_ranks_is_proved_and_sees_the_same(
    tmp_path: Path, caches: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole: Seen = {}
    undisturbed = begin(tmp_path / "whole", caches[0], mix=caches[1:], weights=WEIGHTS)
    live(undisturbed, 1, whole)
    config, seen = begin(tmp_path / "run", caches[0], mix=caches[1:], weights=WEIGHTS), Seen()
    for world, steps in ((2, 4), (1, 7), (4, 5)):
        live(config, world, seen, steps=steps, torn=1)
    live(config, 2, seen)
    assert seen == whole
    assert sorted(seen) == list(range(END))
    lines, proof = examine(load_run(config.run), config.run)
    assert proof.problems == []
    assert totals(lines) == totals(read_ledger(open_storage(undisturbed.run)))
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    order = dataset_of(config).order(config.seed, BATCH, weights=WEIGHTS)
    assert isinstance(order, Mixture)
    (photos, drawings) = order.orders
    # 160 of 240 samples are photos, 80 are drawings.
    for own, label, count in ((photos, "photos", 160), (drawings, "drawings", 80)):
        full = count // own.epoch_samples
        line = next(one for one in said if one[:1] == ["0"] and label in one)
        assert line[-4:] == [f"{own.epoch_samples}", f"{own.epoch_samples}", f"{own.dropped}", "0"]
        assert line[:3] == ["0", "to", f"{full - 1},"]
    assert sum(epoch.samples for epoch in proof.epochs if epoch.part == 0) == 160


def test_a_wrong_record_of_a_mixture_is_named_with_its_dataset(
    tmp_path: Path, caches: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = begin(tmp_path / "run", caches[0], mix=caches[1:], weights=WEIGHTS)
    live(config, 1, {}, steps=9, change=lambda rank, batch: [] if batch.n == 16 else [batch])
    assert cli.main(["ledger", config.run]) == 1
    said = capsys.readouterr().err
    named = {label for label in ("photos/00", "drawings/00") if label in said}
    assert named == {"photos/00", "drawings/00"}


def test_a_mixture_that_moved_is_proved_where_it_lies_now(
    tmp_path: Path, caches: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = begin(tmp_path / "run", caches[0], mix=caches[1:], weights=WEIGHTS)
    live(config, 1, {}, steps=6)
    moved = str(tmp_path / "moved")
    make_cache(moved, OTHER)
    assert cli.main(["ledger", config.run, f"dataset={caches[0]},{moved}"]) == 0
    assert f"{moved}: version 1 " in capsys.readouterr().out
    for given, words in (
        (moved, "is trained on 2 datasets, and 1 are named"),
        (f"{moved},{caches[0]}", "does not hold"),
    ):
        assert cli.main(["ledger", config.run, f"dataset={given}"]) == 1
        assert words in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# Training


def test_a_mixture_trains_resumes_and_is_proved(tmp_path: Path, caches: tuple[str, str]) -> None:
    config = settings_of(tmp_path, caches)
    assert train.main(replace(config, samples=24)) == 0
    assert train.main(config) == 0
    info = load_run(config.run)
    digests = [load_manifest(open_storage(url)).digest for url in caches]
    assert info.manifests == {"train": digests[0], "mix1": digests[1]}
    assert info.facts["mixture"] == [2, 1]
    run = open_storage(config.run)
    commit = read_commit(run, 48)
    assert (commit.manifests, commit.mixture) == (info.manifests, [2, 1])
    _, proof = examine(info, config.run)
    assert proof.problems == []
    assert sum(epoch.samples for epoch in proof.epochs if epoch.part == 0) == 32


def test_one_dataset_leaves_no_word_of_a_mixture(tmp_path: Path, caches: tuple[str, str]) -> None:
    config = settings_of(tmp_path, caches, data=DataConfig(train=caches[0]), samples=8)
    assert train.main(config) == 0
    run = open_storage(config.run)
    assert set(json.loads(run.get("run.json"))) == {"manifests", "dataset_samples", "order", "contract", "versions"}
    assert "mixture" not in json.loads(run.get("checkpoints/000000000008/commit.json"))["commit"]


def test_a_run_that_was_begun_before_there_were_mixtures_goes_on(tmp_path: Path, caches: tuple[str, str]) -> None:
    config = settings_of(tmp_path, caches, data=DataConfig(train=caches[0]), samples=8)
    assert train.main(config) == 0
    path = Path(config.run) / "config.yaml"
    kept = [line for line in path.read_text().splitlines() if line.strip() not in ("mix: []", "weights: []")]
    path.write_text("\n".join(kept) + "\n")
    assert "mix" not in path.read_text().split()
    assert train.main(replace(config, samples=16)) == 0
    assert committed(open_storage(config.run))[0] == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b, c: DataConfig(train=a, mix=(b,), weights=(3, 1)), r"data.weights was \[2.0, 1.0\] and is \[3"),
        (lambda a, b, c: DataConfig(train=b, mix=(a,), weights=WEIGHTS), "in another order: data.train=.*drawings was"),
        (lambda a, b, c: DataConfig(train=a, mix=(c,), weights=WEIGHTS), "but that of data.mix=.*third is"),
        (lambda a, b, c: DataConfig(train=c, mix=(b,), weights=WEIGHTS), "but that of data.train=.*third is"),
        (lambda a, b, c: DataConfig(train=a, mix=(b, c), weights=WEIGHTS), "trained on 2 datasets, but .* name 3"),
    ],
)
def test_a_resume_with_another_mixture_is_refused_by_name(
    tmp_path: Path,
    caches: tuple[str, str],
    change: object,
    words: str,
) -> None:
    third = str(tmp_path / "third")
    make_cache(third, [9, 9])
    config = settings_of(tmp_path, caches, samples=8)
    assert train.main(config) == 0
    other = change(*caches, third)  # type: ignore[operator]
    with pytest.raises(RunError, match=words):
        train.main(replace(config, data=other, samples=16))


def test_the_caches_of_a_mixture_may_move_and_grow(
    tmp_path: Path, caches: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings_of(tmp_path, caches, data=DataConfig(train=caches[0], mix=(caches[1],)), samples=8)
    assert train.main(config) == 0
    moved = str(tmp_path / "moved")
    manifest = make_cache(moved, OTHER)
    grown = dataclasses.replace(manifest, shards=manifest.shards[:-1], units=manifest.units[:-1], version=2)
    commit_manifest(open_storage(moved), grown)
    before = load_run(config.run).facts
    capsys.readouterr()
    assert train.main(replace(config, data=DataConfig(train=caches[0], mix=(moved,)), samples=48)) == 0
    assert f"{moved} has grown to version 2; this run goes on with version 1" in capsys.readouterr().err
    assert load_run(config.run).facts == before
    assert examine(load_run(config.run), config.run)[1].problems == []


# --------------------------------------------------------------------------------------------------------------------
# What does not fit


def change_contract(url: str, sizes: list[int], **changes: object) -> Manifest:
    """A cache whose manifest says something else."""
    manifest = make_cache(url, sizes)
    changed = dataclasses.replace(manifest, contract=dataclasses.replace(manifest.contract, **changes))  # type: ignore[arg-type]
    storage = open_storage(url)
    for name in ("manifest.json", manifest.name):
        storage.delete(name)
    commit_manifest(storage, changed)
    return changed


def test_caches_of_other_encoders_or_texts_or_dtypes_are_refused(tmp_path: Path, caches: tuple[str, str]) -> None:
    contract = small_cache.contract()
    assert contract.text is not None
    tokens = dataclasses.replace(contract.text, storage="tokens")
    stored = (
        contract.members[0],
        Member(name="tokens", shape=(contract.text.length,), dtype="int32"),
        *contract.members[2:],
    )
    wide = (dataclasses.replace(contract.members[0], dtype="float32"), *contract.members[1:])
    cases: list[tuple[dict[str, object], str]] = [
        ({"vae_sha256": "f" * 64}, "data.mix=.* was made differently: vae_sha256: ffffffffffff, not aaaaaaaaaaaa"),
        ({"scale": 0.25}, "data.mix=.* was made differently: scale: 0.25, not 0.5"),
        ({"text": tokens, "members": stored}, "data.mix=.* was made differently: text.storage: tokens, not full"),
        ({"members": wide}, "data.mix=.* holds moments as float32, not float16"),
    ]
    for number, (changes, words) in enumerate(cases):
        url = str(tmp_path / f"other{number}")
        change_contract(url, OTHER, **changes)
        with pytest.raises(ContractMismatch, match=words):
            train.main(settings_of(tmp_path, (caches[0], url)))


def test_caches_of_other_sizes_are_mixed_batch_by_batch(tmp_path: Path, caches: tuple[str, str]) -> None:
    url = str(tmp_path / "large")
    make_cache(url, OTHER, side=4)
    config = settings_of(tmp_path, (caches[0], url))
    dataset = dataset_of(config)
    order = dataset.order(3, BATCH, weights=WEIGHTS)
    of = dataset.part_of(order.locate(np.arange(30 * BATCH)).block).reshape(30, BATCH)
    assert (of == of[:, :1]).all()
    assert of[:, 0].sum() == 10
    assert train.main(config) == 0
    assert examine(load_run(config.run), config.run)[1].problems == []
    small = str(tmp_path / "small")
    make_cache(small, [5], side=4)
    with pytest.raises(
        ConfigError, match=r"small cannot be mixed in: .* has 5 records, fewer than one global batch of 8"
    ):
        train.main(settings_of(tmp_path, (caches[0], small), run=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataConfig(train="a", weights=(1,)), "data.weights=[1] without data.mix: name the caches to mix in"),
        (DataConfig(train="a", mix=("b",), weights=(1,)), "data.weights=[1]: 2 weights are wanted, the first cache's"),
        (DataConfig(train="a", mix=("b",), weights=(1, 0)), "data.weights=[1, 0]: numbers above 0 are wanted"),
        (DataConfig(train="a", mix=("b",), weights=(1, float("nan"))), "numbers above 0 are wanted"),
        (DataConfig(train="a", mix=("b",), weights=(1, float("inf"))), "numbers above 0 are wanted"),
        (DataConfig(train="a", mix=("b", "a/")), "data.mix: a is given twice; give it once, with a larger weight"),
        (DataConfig(train="a", mix=("",)), "the name of a cache is empty"),
        (DataConfig(train="a", mix=("b",), val="b"), "data.val=b is the training cache"),
    ],
)
def test_weights_and_caches_that_cannot_be_meant_are_refused(data: DataConfig, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(TrainConfig(run="r", data=data))
    assert words in str(caught.value)
    if not data.val:
        with pytest.raises(ConfigError):
            check(DataVerbConfig(dataset=data.train, mix=data.mix, weights=data.weights))


def test_a_mixture_is_given_on_the_command_line() -> None:
    for given in (
        ["data.mix=[b,s3://bucket/c]"],
        ["data.mix=b", "data.mix=s3://bucket/c"],
        ["data.mix=['b', s3://bucket/c]"],
    ):
        data = load("train", ["run=r", "data.train=a", *given, "data.weights=[0.7,2,1e-1]"]).data
        assert (data.mix, data.weights) == (("b", "s3://bucket/c"), (0.7, 2.0, 0.1))
    assert load("train", ["run=r", "data.train=a", "data.mix=[]"]).data.mix == ()


# --------------------------------------------------------------------------------------------------------------------
# latentmill data


def test_data_shows_shares_and_names_shards_with_their_dataset(
    tmp_path: Path, caches: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"dataset={caches[0]}", f"mix=[{caches[1]}]", "weights=[2,1]", "batch=8", "world=2", "seed=3"]
    assert cli.main(["data", *arguments]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 samples are of it" in said
    assert "1 of 3 samples are of it" in said
    assert "global batch 8, mixed within each" in said
    assert "photos/00000" in said
    config = begin(tmp_path / "run", caches[0], seed=3, mix=caches[1:], weights=WEIGHTS)
    assert cli.main(["data", f"run={config.run}", "world=2"]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == said.splitlines()[:5]
    with pytest.raises(LatentmillError, match="is trained on 2 datasets, and 3 are named"):
        job_of(DataVerbConfig(run=config.run, dataset="a", mix=("b", "c"), world=2))


def test_blocks_told_are_those_that_the_stream_reads_and_a_dataset_is_read_once_in_each_of_its_epochs(
    caches: tuple[str, str],
) -> None:
    job = job_of(DataVerbConfig(dataset=caches[0], mix=caches[1:], weights=WEIGHTS, batch=BATCH, world=2, seed=3))
    told = reads(job, 0, 4 * BATCH)
    for rank in range(2):
        with Stream(job.dataset, job.order, rank=rank, world=2, batch=BATCH) as stream:
            read = {shard for _ in range(4) for shard in next(stream).shards.tolist()}
        assert set(job.dataset.shards[told.touched[rank]].tolist()) == read
    places = job.order.locate(np.arange(30 * BATCH))
    ranks = np.arange(30 * BATCH) % BATCH // 4
    distinct = set(zip(ranks.tolist(), places.block.tolist(), places.epoch.tolist(), strict=True))
    assert reads(job, 0, 30 * BATCH).times.sum() == len(distinct)
    assert "samples from 0 on" in describe(job, 2)
