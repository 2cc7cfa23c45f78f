"""`latentmill data`: what it says that ranks and nodes would read is what the real stream reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from made.cache import make_cache
from pipeline import cli
from pipeline.config import DataConfig, DataVerbConfig, OptimConfig, TrainConfig
from pipeline.data.format.manifest import Manifest, commit_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.order.mixture import orders_of
from pipeline.data.reading import stream as stream_module
from pipeline.data.reading.stream import Stream
from pipeline.errors import ConfigError, DatasetError
from pipeline.preview import describe, job_of, reads, size
from pipeline.runs.directory import COMMIT, checkpoint_folder
from pipeline.storage.urls import open_storage
from pipeline.training.life import describe_run

SIZES = [9, 14, 11, 7, 16, 12, 8, 10, 13, 9, 15, 12, 10, 11, 9, 14]  # 180 records, a block each shard
BATCH = 16


@pytest.fixture
def cache(tmp_path: Path) -> tuple[str, Manifest]:
    url = str(tmp_path / "cache")
    return url, make_cache(url, SIZES)


def config_of(url: str, **changes: object) -> DataVerbConfig:
    return replace(DataVerbConfig(dataset=url, batch=BATCH, world=4, nodes=2, seed=5), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("at", [0, 3 * BATCH, 9 * BATCH])
def test_the_blocks_told_of_each_rank_are_those_that_the_stream_reads(
    cache: tuple[str, Manifest], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(stream_module, "POLL", 0.005)
    url, manifest = cache
    storage = open_storage(url)
    job = job_of(config_of(url, at=at))
    previewed = reads(job, at, at + 5 * BATCH)
    order = dataset_of(storage, manifest).order(5, BATCH)
    for rank in range(4):
        with Stream(dataset_of(storage, manifest), order, rank=rank, world=4, batch=BATCH, start_n=at) as stream:
            read = {shard for _ in range(5) for shard in next(stream).shards.tolist()}
        assert set(job.dataset.shards[previewed.touched[rank]].tolist()) == read
    per_rank = previewed.touched @ job.dataset.bytes
    assert previewed.by_node(2, job.dataset.bytes).tolist() == [per_rank[:2].sum(), per_rank[2:].sum()]


def test_amplification_bandwidth_and_memory_are_those_of_an_epoch(cache: tuple[str, Manifest]) -> None:
    url, manifest = cache
    job = job_of(config_of(url, images_per_s=100.0))
    (order,) = orders_of(job.order)
    text = describe(job, 2)
    blocks = job.order.locate(np.arange(order.epoch_samples)).block.reshape(-1, 4, BATCH // 4)
    of_rank = [set(blocks[:, rank].reshape(-1).tolist()) for rank in range(4)]
    count, distinct = sum(map(len, of_rank)), len(set().union(*of_rank))
    assert f"{count / distinct:.3f}   {count} reads of {distinct} blocks" in text
    per_rank = [sum(int(job.dataset.bytes[block]) for block in mine) for mine in of_rank]
    busiest = max(per_rank[0] + per_rank[1], per_rank[2] + per_rank[3])
    assert f"{size(busiest / order.epoch_samples * 100)}/s   at 100 images/s of all ranks, busiest node" in text
    needed = max(job.order.window_bytes(job.dataset.bytes, rank * 4, 4) for rank in range(4))
    assert f"{size(needed)}   at most" in text
    assert sum(entry.bytes for entry in manifest.shards) <= job.dataset.bytes.sum()


def begin(url: str, manifest: Manifest, folder: Path, memory_gb: float = 4.0) -> str:
    config = TrainConfig(
        run=str(folder), data=DataConfig(train=url, memory_gb=memory_gb), optim=OptimConfig(batch=BATCH), seed=5
    )
    run = open_storage(config.run)
    describe_run(config, run, manifest, {"train": manifest.digest})
    run.put(f"{checkpoint_folder(3 * BATCH)}{COMMIT}", b"{}")
    run.put("metrics.jsonl", b"".join(b'{"n": 1, "images_per_s": %d}\n' % rate for rate in (80, 120, 100)) + b"{}")
    return config.run


def test_a_run_tells_dataset_version_batch_seed_commit_and_rate(
    cache: tuple[str, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, manifest = cache
    run = begin(url, manifest, tmp_path / "run")
    commit_manifest(open_storage(url), replace(manifest, shards=manifest.shards[:-1], version=2))
    job = job_of(DataVerbConfig(run=run, world=4))
    assert job.dataset.parts[0].manifest.version == 1
    assert (job.batch, job.order.seed, job.at, job.images_per_s) == (BATCH, 5, 3 * BATCH, 100.0)
    assert cli.main(["data", f"run={run}", "world=4", "nodes=4", "batches=3"]) == 0
    text = capsys.readouterr().out
    assert "4 ranks on 4 nodes, from sample 48 (epoch 0)" in text
    assert "The next 3 batches, samples 48 to 95" in text
    assert "at 100 images/s" in text
    assert "at most; data.memory_gb=4 is enough" in text
    assert job_of(DataVerbConfig(run=run, world=4, seed=6, at=0, images_per_s=7)).order.seed == 6


def test_memory_that_is_too_little_for_a_rank_is_said(cache: tuple[str, Manifest], tmp_path: Path) -> None:
    run = begin(*cache, tmp_path / "run", memory_gb=1e-5)
    assert "data.memory_gb=1e-05 is TOO LITTLE" in describe(job_of(DataVerbConfig(run=run, world=4)), 1)


def test_what_cannot_be_planned_is_one_line(cache: tuple[str, Manifest], tmp_path: Path) -> None:
    url = cache[0]
    with pytest.raises(ConfigError, match="does not divide among 3 ranks"):
        job_of(config_of(url, world=3, nodes=1))
    with pytest.raises(ConfigError, match="at=17: batches of 16 start at 16 and 32"):
        job_of(config_of(url, at=17))
    with pytest.raises(DatasetError, match="is not a dataset"):
        job_of(config_of(str(tmp_path / "absent")))


def test_nodes_must_share_the_ranks_and_something_must_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["dataset=d", "world=4", "nodes=3"], "world=4 does not divide among nodes=3"),
        ([], "dataset is missing: give dataset=CACHE, or run=RUN"),
    ):
        assert cli.main(["data", *arguments]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (950, "950 B"), (1234, "1.23 kB"), (999_600, "1 MB"), (123_456_789, "123 MB"), (2.5e12, "2.5 TB")],
)
def test_sizes_are_told_in_three_digits(count: float, text: str) -> None:
    assert size(count) == text
