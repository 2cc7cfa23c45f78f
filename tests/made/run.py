"""Makes a small cache and a small run with a committed checkpoint, for tests of code that reads runs.

Encoders and denoiser have seeded random weights, so pictures show nothing meaningful, but every part is the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from made.commits import save_now
from made.facts import Facts
from pipeline.config import (
    DataConfig,
    DiffusionConfig,
    EncodeConfig,
    EncodersConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    SamplerConfig,
    TaskConfig,
    TextTask,
    TrackingConfig,
    TrainConfig,
)
from pipeline.config.tasks.base import Cache
from pipeline.data.format.manifest import load_manifest
from pipeline.distributed.world import World
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from pipeline.runs.directory import fixed_keys
from pipeline.runs.fragments import Fragment
from pipeline.storage.urls import open_storage
from pipeline.training.life import describe_run
from pipeline.training.saver import Stamp
from preprocess import encode
from preprocess.shapes.shards import write_shards

IMAGES = 24
SOURCE = "shapes/{00000..00001}.tar"
MODEL = ModelConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, context_width=128)
DIFFUSION = DiffusionConfig()
SAMPLER = SamplerConfig(sampler="ddim", steps=4, guidance=2.0, batch=5)


def make_cache(
    folder: Path,
    images: int = IMAGES,
    encoders: EncodersConfig | None = None,
    seed: int = 1,
    drawn: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Writes captioned shapes of split "val" to folder/shapes, and their cache to folder/cache. seed: of the shapes.
    drawn: which (single) and with what (classes)."""
    write_shards(str(folder / "shapes"), images, seed, "val", shard_size=images // 2, **(drawn or {}))
    config = EncodeConfig(
        source=str(folder / SOURCE),
        dest=str(folder / "cache"),
        encoders=encoders or EncodersConfig(seed=1),
        batch=12,
        decode_in="threads",
        launch=LaunchConfig(threads=1),
        **changes,
    )
    encode.main(config)
    return folder / "cache"


def train_config(
    folder: Path,
    task: TaskConfig = TextTask(),  # noqa: B008  (frozen)
    reference: str = "",
    diffusion: DiffusionConfig = DIFFUSION,
) -> TrainConfig:
    model = ModelConfig(**{**vars(MODEL), "context_width": MODEL.context_width if task.makes_context else 0})
    return TrainConfig(
        run=str(folder / "run"),
        data=DataConfig(train=str(folder / "cache"), val=str(folder / "cache")),
        model=model,
        task=task,
        diffusion=diffusion,
        eval=EvalConfig(images=12, grid=4, reference=reference, sampler=SAMPLER),
        tracking=TrackingConfig(wandb="off"),
        samples=128,
    )


def make_denoiser(config: TrainConfig, empty_LD: Tensor | None = None, cache: Cache | None = None) -> Denoiser:
    """A denoiser without zero weights, which a freshly initialised one has."""
    empty = torch.zeros(32, 128) if empty_LD is None else empty_LD
    task = make_task(config.task, config.model, cache or Facts(), empty)
    denoiser = Denoiser(config.model, task)
    denoiser.reset_parameters(0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return denoiser


def make_run(folder: Path, n: int = 128, kept: dict[str, float] | None = None, **changes: Any) -> TrainConfig:
    """Makes a run directory folder/run with one commit; folder/cache must exist. The raw weights are twice the EMA.
    kept: further averages by kind, as multiples of the EMA."""
    config = train_config(folder, **changes)
    manifest = load_manifest(open_storage(config.data.train))
    run = open_storage(config.run)
    describe_run(config, run, manifest, {"train": manifest.digest})
    state = make_denoiser(config, cache=manifest.contract if config.task.conditions else None).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    save_now(
        run,
        World(),
        {
            kind: [Fragment(name, 0, factor * tensor.reshape(-1)) for name, tensor in state.items()]
            for kind, factor in {"ema": 1.0, "weights": 2.0, **(kept or {})}.items()
        },
        n=n,
        steps=n // 64,
        stamp=Stamp("torch", fixed_keys(config), {"train": manifest.digest}, shapes),
    )
    return config
