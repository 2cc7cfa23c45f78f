"""One step of training: what it draws depends on the samples alone, and what is not finite is not stepped on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from made import cache as small_cache
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
from pipeline.data.reading.batch import Batch
from pipeline.distributed.world import World
from pipeline.errors import NonFinite
from pipeline.models.encoders.latents import Latents
from pipeline.runs.directory import committed
from pipeline.storage.urls import open_storage
from pipeline.tracking.tracker import read_rows
from pipeline.training.inputs import Inputs
from pipeline.training.objectives.diffusion import DiffusionObjective

BATCH = 8


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    small_cache.make_cache(str(tmp_path / "cache"), [20, 17, 9])
    return TrainConfig(
        run=str(tmp_path / "run"),
        data=DataConfig(train=str(tmp_path / "cache")),
        model=MODEL,
        optim=OptimConfig(batch=BATCH),
        deepspeed=DeepSpeedConfig(engine="torch"),
        checkpoint=CheckpointConfig(every=2 * BATCH),
        tracking=TrackingConfig(wandb="off", every=BATCH),
        samples=6 * BATCH,
        device="cpu",
        launch=LaunchConfig(threads=1),
    )


def test_what_a_sample_draws_does_not_depend_on_the_rank_that_has_it(config: TrainConfig) -> None:
    tensors = {"moments": torch.zeros(4, 8, 4, 4)}
    batch: Any = SimpleNamespace(numbers=torch.arange(100, 104), tensors=tensors, chosen=None)
    task: Any = SimpleNamespace(prepare=lambda tensors, *_, **__: tensors)
    inputs = Inputs(Latents("moments", 1.0, 0.0), task, config.seed)
    engines: list[Any] = [SimpleNamespace(world=World(rank, 2)) for rank in range(2)]
    one, other = (
        DiffusionObjective(config.diffusion, config.task.drop, engine=engine, inputs=inputs).prepare(batch).draws
        for engine in engines
    )
    for name in ("posterior", "noise", "timestep", "drop"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_optimizer_steps(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = Inputs.on_device

    def damaged(self: Inputs, batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        moments, conditions = on_device(self, batch, device)
        if batch.n == 3 * BATCH:
            moments[5] = torch.nan
        return moments, conditions

    monkeypatch.setattr(Inputs, "on_device", damaged)
    with pytest.raises(NonFinite, match=r"sample 29 \(.*latent is not finite"):
        train.main(config)
    assert committed(open_storage(config.run)) == [2 * BATCH]
    assert max(row["n"] for row in read_rows(Path(config.run, "metrics.jsonl")) if row["kind"] == "train") == 3 * BATCH
