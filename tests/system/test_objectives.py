"""Whole runs with other objectives: they resume, and split into micro-batches, as those with the default one do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made import cache as small_cache
from pipeline import train
from pipeline.config import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    DiffusionConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.runs.checkpoint import load_weights
from pipeline.runs.ledger import read_ledger, totals
from pipeline.storage.urls import open_storage

BATCH = 8
MODEL = ModelConfig(
    channels=8, multipliers=(1,), blocks=1, attention=(1,), heads=2, context_width=small_cache.WIDTH, norm_groups=4
)
STRATIFIED: dict[str, Any] = {"timestep_sampling": "stratified", "offset_noise": 0.1}
OBJECTIVES = {
    "flow": DiffusionConfig(prediction="flow", timestep_density="logit_normal", **STRATIFIED),
    "edm": DiffusionConfig(prediction="edm", timestep_density="log_normal", **STRATIFIED),
    "zero_snr": DiffusionConfig(prediction="v", zero_terminal_snr=True, **STRATIFIED),
    "min_snr": DiffusionConfig(prediction="x0", schedule="cosine", min_snr_gamma=5.0),
}


def losses(config: TrainConfig) -> dict[int, float]:
    found = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    return {row["n"]: row["loss"] for row in found if row["kind"] == "train"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_stops_and_goes_on_equals_one_that_did_not(name: str, tmp_path: Path) -> None:
    small_cache.make_cache(str(tmp_path / "cache"), [20, 17, 9])
    straight = TrainConfig(
        run=str(tmp_path / "straight"),
        data=DataConfig(train=str(tmp_path / "cache")),
        model=MODEL,
        diffusion=OBJECTIVES[name],
        optim=OptimConfig(lr=1e-3, warmup=40, batch=BATCH),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=40),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=80,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )
    stopped = replace(straight, run=str(tmp_path / "stopped"))
    split = replace(straight, run=str(tmp_path / "split"), optim=replace(straight.optim, micro_batch=2))
    for config in (straight, replace(stopped, samples=40), stopped, split):
        assert train.main(config) == 0
    weights = {config.run: load_weights(open_storage(config.run), 80)[1] for config in (straight, stopped)}
    for key, tensor in weights[straight.run].items():
        assert torch.equal(tensor, weights[stopped.run][key]), key
    assert losses(stopped) == losses(straight)
    sums = {totals(read_ledger(open_storage(config.run))) for config in (straight, stopped, split)}
    assert len(sums) == 1  # the same samples with the same noise and times
    assert losses(split) == pytest.approx(losses(straight), abs=1e-5)
    assert all(torch.isfinite(tensor).all() for tensor in weights[straight.run].values())
