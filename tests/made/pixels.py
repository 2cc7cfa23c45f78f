"""A small cache of pixels, and configurations of autoencoders that are trained on it in moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from made.encode import config as encode_config
from made.encode import write_sized
from pipeline.config import (
    AutoencoderConfig,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EmaConfig,
    FirstStageConfig,
    FirstStageLossConfig,
    GanConfig,
    LaunchConfig,
    OptimConfig,
    TrackingConfig,
)
from preprocess import encode

BATCH, RECORDS, SIDE, CROP = 8, 24, 32, 16
STAGE: dict[str, Any] = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "latent_channels": 3, "norm_groups": 4}
KL, VQ = FirstStageConfig(name="kl", **STAGE), FirstStageConfig(name="vq", regularizer="vq", codes=24, **STAGE)
GAN = GanConfig(weight=0.5, after=4 * BATCH, warmup=BATCH, ramp=2 * BATCH, channels=8, layers=2)
LOSSES = {
    "kl": FirstStageLossConfig(l1=0.02, l2=1.0, kl=1e-3),
    "vq": FirstStageLossConfig(l1=0.0, l2=1.0, restart=3 * BATCH),
}
"""Mostly squares: the gradient of L1 jumps where an error changes its sign. One of a batch's 6,144 signs changes the
gradient's norm by 6e-3 (training/test_first_stage_gradients.py), and weights that differ by roundings decide it."""


def make_pixels(folder: Path, **changes: Any) -> str:
    """Encodes RECORDS pictures of SIDE pixels to folder/pixels. Returns its path."""
    (folder / "in").mkdir(parents=True)
    write_sized(folder / "in" / "0.tar", [(SIDE, SIDE), (40, SIDE), (48, 48)] * (RECORDS // 3))
    settings: dict[str, Any] = {"stored": "pixels", "resolution": (SIDE,), "text_storage": "none", **changes}
    assert encode.main(encode_config(str(folder / "in" / "*.tar"), folder / "pixels", **settings)) == 0
    return str(folder / "pixels")


def config_of(cache: str, run: Path | str, stage: FirstStageConfig = KL, **changes: Any) -> AutoencoderConfig:
    """A run with a discriminator that begins to train in it."""
    settings: dict[str, Any] = {
        "run": str(run),
        "seed": 3,
        "data": DataConfig(train=cache),
        "autoencoder": stage,
        "loss": LOSSES[stage.regularizer],
        "gan": GAN,
        "crop": CROP,
        "flip": True,
        "optim": OptimConfig(lr=1e-3, betas=(0.5, 0.9), weight_decay=0.0, warmup=BATCH, batch=BATCH),
        "ema": EmaConfig(half_life=50.0),
        "deepspeed": DeepSpeedConfig(engine="torch"),
        "checkpoint": CheckpointConfig(every=2 * BATCH, keep=20),
        "tracking": TrackingConfig(wandb="off", every=BATCH),
        "samples": 8 * BATCH,
        "device": "cpu",
        "launch": LaunchConfig(threads=1),
    }
    return AutoencoderConfig(**{**settings, **changes})
