"""`latentmill autoencoder` with data.val: evaluations before, while and after training, and beside it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made.autoencoder_run import make_pixels as make_val
from made.pixels import BATCH, VQ, config_of, make_pixels
from pipeline import autoencoder
from pipeline.config import AutoencoderConfig, CheckpointConfig, DataConfig, FirstStageEvalConfig, TrackingConfig
from pipeline.errors import ContractMismatch
from pipeline.evaluation import beside
from pipeline.runs.checkpoint import load_weights
from pipeline.runs.directory import committed, is_finished
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import read_rows

END = 4 * BATCH
SECONDS = 240.0


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    make_pixels(folder)
    make_val(str(folder / "val"), [4, 5])
    return folder


def config(caches: Path, run: Path, val: str = "val", **changes: Any) -> AutoencoderConfig:
    settings: dict[str, Any] = {
        "data": DataConfig(train=str(caches / "pixels"), val=str(caches / val) if val else ""),
        "eval": FirstStageEvalConfig(every=2 * BATCH, images=6, pairs=2, batch=4),
        "checkpoint": CheckpointConfig(every=END, keep=1, best="psnr" if val else ""),
        "tracking": TrackingConfig(wandb="off", every=BATCH),
        "samples": END,
        **changes,
    }
    return config_of(str(caches / "pixels"), run, VQ, **settings)


def figures(run: str) -> dict[int, dict[str, Any]]:
    found = sorted(Path(run).glob("evals/*/metrics.json"))
    metrics = {int(path.parent.name): json.loads(path.read_text()) for path in found}
    timed = ("seconds", "encode_images_per_s", "decode_images_per_s")
    return {n: {name: value for name, value in of.items() if name not in timed} for n, of in metrics.items()}


@pytest.fixture(scope="module")
def inside(caches: Path) -> AutoencoderConfig:
    """A run that evaluates inside training."""
    run = config(caches, caches / "inside")
    assert autoencoder.main(run) == 0
    return run


def test_an_autoencoder_is_evaluated_before_while_and_after_training(inside: AutoencoderConfig) -> None:
    found = figures(inside.run)
    assert list(found) == [0, 2 * BATCH, END] and {of["images"] for of in found.values()} == {6}
    assert len({of["psnr"] for of in found.values()}) == 3
    rows = [row for row in read_rows(Path(inside.run, "metrics.jsonl")) if row["kind"] == "eval"]
    assert {row["n"]: row["psnr"] for row in rows} == {n: of["psnr"] for n, of in found.items()}
    assert is_finished(inside, open_storage(inside.run))
    # checkpoint.keep=1: the last is kept, and the best of those that were evaluated when it was committed
    assert committed(open_storage(inside.run)) == [END, 2 * BATCH]


def test_evaluations_change_nothing_of_training(caches: Path, inside: AutoencoderConfig, tmp_path: Path) -> None:
    without = config(caches, tmp_path / "without", val="")
    assert autoencoder.main(without) == 0
    for which in ("ema", "raw"):
        one, other = (load_weights(open_storage(run.run), END, which, ("model.",))[1] for run in (inside, without))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_a_process_beside_training_makes_the_figures_that_training_makes(
    caches: Path, inside: AutoencoderConfig, tmp_path: Path
) -> None:
    run = config(caches, tmp_path / "run")
    run = replace(run, eval=replace(run.eval, where="job"))
    assert autoencoder.main(run) == 0
    storage, limit = open_storage(run.run), time.monotonic() + SECONDS
    while beside.pending(storage) or len(figures(run.run)) < 3:
        assert time.monotonic() < limit, (tmp_path / "run" / beside.LOG).read_text()
        time.sleep(0.2)
    assert figures(run.run) == figures(inside.run)


def test_pictures_that_the_autoencoder_cannot_take_are_refused_before_training(caches: Path, tmp_path: Path) -> None:
    make_val(str(caches / "odd"), [3], side=18 + 1)
    with pytest.raises(ContractMismatch, match="has pictures of 19 x 19 pixels"):
        autoencoder.main(config(caches, tmp_path / "run", val="odd"))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
