"""Makes the run of a classifier of noisy latents without a cache, for tests of guides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from made.commits import save_now
from pipeline.config import ClassifierTask, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from pipeline.data.format.contract import Contract
from pipeline.distributed.world import World
from pipeline.models.classifier import Classifier
from pipeline.runs.directory import fixed_keys
from pipeline.runs.fragments import Fragment
from pipeline.storage.urls import open_storage
from pipeline.training.life import describe_run
from pipeline.training.saver import Stamp


def make_classifier(
    folder: Path, contract: Contract, diffusion: DiffusionConfig | None = None, in_channels: int = 4
) -> str:
    """Writes a run of one commit to `folder`, trained on a cache of this contract; weights are seeded and random.
    Returns its path."""
    model = ModelConfig(
        channels=32, multipliers=(1, 2), blocks=1, attention=(), heads=2, context_width=0, in_channels=in_channels
    )
    task = ClassifierTask()
    config = TrainConfig(
        run=str(folder),
        data=DataConfig(train=str(folder.parent / "cache")),
        model=model,
        task=task,
        diffusion=diffusion or DiffusionConfig(),
        samples=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        classifier = Classifier(model, task.classes(contract), task.pool)
        state = {name: t + 0.1 * torch.randn(t.shape) for name, t in classifier.state_dict().items()}
    run = open_storage(config.run)
    describe_run(config, run, SimpleNamespace(samples=128, contract=contract), {"train": "a" * 64})  # type: ignore[arg-type]
    stamp = Stamp("torch", fixed_keys(config), {"train": "a" * 64}, {name: t.shape for name, t in state.items()})
    fragments = {kind: [Fragment(name, 0, t.reshape(-1)) for name, t in state.items()] for kind in ("ema", "weights")}
    save_now(run, World(), fragments, n=128, steps=2, stamp=stamp)
    return config.run
