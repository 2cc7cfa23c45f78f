"""Training on what encode can store: tokens train as full states do; of trimmed texts nothing beyond the end counts;
excluded records are never seen; buckets are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from made import encode as small_encode
from made.encode import ENCODERS, png, write_sized, write_tar
from made.run import SAMPLER, make_cache, train_config
from pipeline import train
from pipeline.config import (
    DataConfig,
    DeepSpeedConfig,
    EncodeConfig,
    EvalRunConfig,
    FiltersConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TextTask,
    TrainConfig,
)
from pipeline.data.format.excluded import load_excluded
from pipeline.data.format.manifest import load_manifest
from pipeline.data.order.dataset import dataset_of
from pipeline.data.reading import stream as module
from pipeline.data.reading.stream import Stream
from pipeline.distributed.world import World
from pipeline.eval import evaluate_run
from pipeline.inference.trained import encode_captions
from pipeline.models.encoders.text import load_text
from pipeline.models.tasks.choose import make_task
from pipeline.runs.datasets import empty_caption
from pipeline.runs.directory import load_run
from pipeline.sample import sample_rows
from pipeline.storage.urls import open_storage
from pipeline.training.validation import ValidationLoss
from preprocess import encode
from preprocess.shapes.shards import write_shards


def config_of(folder: Path, **changes: object) -> TrainConfig:
    base = train_config(folder)
    fields: dict[str, object] = {
        "deepspeed": DeepSpeedConfig(engine="torch"),
        "optim": OptimConfig(lr=1e-3, warmup=0, batch=8),
        "launch": LaunchConfig(threads=1),
        "samples": 24,
        "device": "cpu",
        "eval": replace(base.eval, images=4, grid=2),
    }
    return replace(base, **{**fields, **changes})  # type: ignore[arg-type]


def losses(folder: Path) -> list[float]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"]


def made(folder: Path, storage: str) -> Path:
    make_cache(folder, text_storage=storage)
    make_cache(folder / "held_out", seed=2, text_storage=storage)
    config = config_of(folder)
    config = replace(config, data=replace(config.data, val=str(folder / "held_out/cache")))
    assert train.main(replace(config, tracking=replace(config.tracking, every=8))) == 0
    return folder


def test_a_cache_of_tokens_trains_as_a_cache_of_states(tmp_path: Path) -> None:
    full, tokens = losses(made(tmp_path / "full", "full")), losses(made(tmp_path / "tokens", "tokens"))
    assert len(full) == 3
    np.testing.assert_allclose(tokens, full, rtol=2e-5)


def test_a_trimmed_cache_trains_evaluates_and_samples_without_what_lies_beyond_the_caption(tmp_path: Path) -> None:
    folder = made(tmp_path, "trimmed")
    assert len(losses(folder)) == 3
    assert '"kind": "val"' in (folder / "run/metrics.jsonl").read_text()
    results = evaluate_run(EvalRunConfig(run=str(folder / "run"), images=4, steps=(2,), guidance=(2.0,)))
    assert results[0].n == 24
    [row] = sample_rows(SampleConfig(run=str(folder / "run"), prompt=("a red circle",), n=1, sampler=SAMPLER))
    assert len(row.images) == 1


def test_the_states_beyond_a_trimmed_caption_are_masked_wherever_they_come_from(tmp_path: Path) -> None:
    make_cache(tmp_path, text_storage="trimmed")
    cache = open_storage(str(tmp_path / "cache"))
    manifest = load_manifest(cache)
    tower = load_text(ENCODERS)
    empty = empty_caption(cache, manifest)
    task = make_task(TextTask(), ModelConfig(), manifest.contract, empty)
    dataset = dataset_of(cache, manifest)
    with Stream(dataset, dataset.order(0, 8), batch=8) as stream:
        batch = next(stream)
    assert batch.tensors["text"].shape == (8, 32, 128)
    lengths = [tower.ids(caption)[1] for caption in batch.captions]
    given = task.condition(batch.tensors)
    assert given.context_mask is not None
    assert given.context_mask.sum(dim=1).tolist() == lengths
    fresh = task.condition({"text": encode_captions(tower, batch.captions, trimmed=True)})
    assert fresh.context_mask is not None
    assert torch.equal(fresh.context_mask, given.context_mask)
    assert torch.allclose(fresh.context[given.context_mask], given.context[given.context_mask].float(), atol=5e-3)  # type: ignore[index]
    null = task(task.null({"text": batch.tensors["text"][:3]}))
    assert null.context_mask is not None
    assert null.context_mask.sum(dim=1).tolist() == [2, 2, 2]
    assert torch.allclose(null.context, encode_captions(tower, [""] * 3, trimmed=True).half(), atol=5e-3)  # type: ignore[arg-type]


def test_the_validation_loss_reads_trimmed_captions_as_the_stream_does(tmp_path: Path) -> None:
    make_cache(tmp_path, text_storage="trimmed")
    cache = open_storage(str(tmp_path / "cache"))
    manifest = load_manifest(cache)
    dataset = dataset_of(cache, manifest)
    with Stream(dataset, dataset.order(0, 24), batch=24) as stream:
        batch = next(stream)
    streamed = dict(
        zip(zip(batch.shards.tolist(), batch.rows.tolist(), strict=True), batch.tensors["text"], strict=True)
    )
    found = ValidationLoss.load(cache, manifest, ("text",), 24, 24, config_of(tmp_path).diffusion, World())
    (rows,) = found.batches
    expected = torch.stack([streamed[place] for place in sorted(streamed)])
    assert torch.equal(rows.tensors["text"], expected)
    assert len({int((text != 0).any(1).sum()) for text in expected}) > 1  # captions of several lengths


def test_the_empty_caption_of_random_weights_has_no_row_of_zeros(tmp_path: Path) -> None:
    states = load_text(ENCODERS).encode(load_text(ENCODERS).tokenize(["", "a red circle"]))
    assert (states != 0).any(dim=-1).all()


def test_excluded_records_are_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    for shard in range(2):
        members = []
        for i in range(12):
            members += [(f"{shard}-{i}.png", png(seed=i)), (f"{shard}-{i}.txt", f"words {i}".encode())]
        write_tar(tmp_path / f"shapes/{shard:05d}.tar", members)
    encode.main(
        EncodeConfig(
            source=str(tmp_path / "shapes/*.tar"),
            dest=str(tmp_path / "cache"),
            encoders=ENCODERS,
            decode_in="threads",
            launch=LaunchConfig(threads=1),
            filters=FiltersConfig(duplicates="image"),
        )
    )
    cache = open_storage(str(tmp_path / "cache"))
    manifest = load_manifest(cache)
    assert len(load_excluded(cache, manifest)) == 12
    seen: list[str] = []
    config = config_of(tmp_path, data=DataConfig(train=str(tmp_path / "cache")), optim=OptimConfig(batch=4), samples=12)
    real = module.Stream._collate

    def watching(self: Stream, plan: object, shards: object) -> object:
        moved = real(self, plan, shards)  # type: ignore[arg-type]
        seen.extend(moved.batch.keys)
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Stream, "_collate", watching)
        assert train.main(config) == 0
    assert len(seen) >= 12
    assert {key.partition("_")[0] for key in seen} == {"000000"}
    assert sorted(seen[:12]) == [f"000000_{row:06d}" for row in range(12)]


def test_a_bucketed_cache_trains_on_batches_of_one_bucket_each(tmp_path: Path) -> None:
    """Images of three aspect ratios, and a bucket with fewer than a batch, which is left out."""
    sizes = [(64, 64)] * 17 + [(96, 64)] * 10 + [(64, 96)] * 9 + [(64, 80)] * 3
    rng = np.random.default_rng(0)
    (tmp_path / "shapes").mkdir()
    for shard in range(2):
        write_sized(tmp_path / f"shapes/{shard:05d}.tar", [sizes[i] for i in rng.permutation(len(sizes))], 100 * shard)
    encode.main(small_encode.config(str(tmp_path / "shapes/*.tar"), tmp_path / "cache", batch=12, buckets=16))
    contract = load_manifest(open_storage(str(tmp_path / "cache"))).contract
    shapes: list[tuple[int, ...]] = []
    real = module.Stream.__next__

    def watching(self: Stream) -> module.Batch:
        batch = real(self)
        shapes.append(tuple(batch.tensors["moments"].shape))
        return batch

    config = config_of(tmp_path, data=DataConfig(train=str(tmp_path / "cache")), samples=8 * 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Stream, "__next__", watching)
        assert train.main(config) == 0
    assert len(contract.buckets) > 2
    assert {shape[0] for shape in shapes} == {8}
    # 34, 20 and 18 records, less what does not fill a batch of every lane: 4, 2 and 2 batches an epoch.
    counts = sorted(shapes.count(shape) for shape in set(shapes))
    assert counts == [2, 2, 4]
    assert {shape[2:] for shape in shapes} == {(8, 8), (6, 10), (10, 6)}


def test_a_run_goes_on_with_the_version_that_it_began_with_when_its_dataset_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(str(tmp_path / "shapes"), 24, 1, "train", shard_size=12)
    cache = tmp_path / "cache"

    def grow(shard: str) -> None:
        encode.main(small_encode.config(str(tmp_path / f"shapes/{shard}.tar"), cache, batch=12))

    grow("00000")
    config = config_of(tmp_path, data=DataConfig(train=str(cache)))
    assert train.main(replace(config, samples=16)) == 0
    begun = load_run(config.run).manifests["train"]
    grow("00001")
    assert load_manifest(open_storage(str(cache))).version == 2
    capsys.readouterr()
    assert train.main(replace(config, samples=48)) == 0
    assert "goes on with version 1" in capsys.readouterr().err
    assert load_run(config.run).manifests["train"] == begun
    fresh = replace(config, run=str(tmp_path / "fresh"))
    assert train.main(fresh) == 0
    assert load_run(fresh.run).manifests["train"] == load_manifest(open_storage(str(cache))).digest != begun
