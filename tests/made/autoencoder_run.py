"""Makes small caches of pixels without `encode`, and runs of autoencoders on them with one commit."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from made.cache import contract
from made.commits import save_now
from pipeline.conditions.facts import Conditions
from pipeline.config import AutoencoderConfig, DataConfig, FirstStageConfig, OptimConfig, TrackingConfig
from pipeline.data.format.contract import Member, canonical_json
from pipeline.data.format.manifest import Manifest, ShardEntry, Statistics, UnitEntry, commit_manifest
from pipeline.data.format.records import Record, record_key
from pipeline.distributed.world import World
from pipeline.models.first_stage.trainable import AVERAGED, TrainableAutoencoder
from pipeline.runs.directory import fixed_keys
from pipeline.runs.fragments import Fragment
from pipeline.storage.urls import open_storage
from pipeline.training.life import describe_run
from pipeline.training.saver import Stamp
from preprocess.encoding.writer import Moments, ShardWriter

SIDE, BATCH = 16, 8
KL = FirstStageConfig(channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, attention=(2,), norm_groups=4)
VQ = FirstStageConfig(
    regularizer="vq", channels=8, multipliers=(1, 2, 2), blocks=1, latent_channels=3, norm_groups=4, codes=20
)


def picture(unit: int, row: int, side: int = SIDE) -> np.ndarray:
    """Pixels (3, side, side) uint8, which identify unit and row: a slope of one colour and some noise."""
    rng = np.random.default_rng([unit, row])
    slope = np.linspace(-1, 1, side)[:, None] * rng.normal() + np.linspace(-1, 1, side) * rng.normal()
    pixels = (
        128 + 50 * slope * rng.random((3, 1, 1)) + 60 * rng.normal(size=(3, 1, 1)) + 10 * rng.normal(size=slope.shape)
    )
    return pixels.clip(0, 255).astype(np.uint8)


def make_pixels(url: str, sizes: list[int], side: int = SIDE) -> Manifest:
    """Writes a cache of pixels whose shards hold `sizes` records each. Returns its manifest."""
    storage = open_storage(url)
    units, entries, moments = [], [], Moments()
    for unit, size in enumerate(sizes):
        tar = io.BytesIO()
        writer = ShardWriter(tar)
        for row in range(size):
            pixels = picture(unit, row, side)
            writer.add(Record(record_key(unit, row), {"pixels": pixels}, {"key": f"source/{unit}.{row}"}))
            moments.add(pixels / 127.5 - 1)
        facts = writer.finish()
        index = canonical_json(facts)
        storage.put(f"{unit:06d}.tar", tar.getvalue())
        storage.put(f"{unit:06d}.index.json", index)
        entries.append(
            ShardEntry(
                name=f"{unit:06d}.tar",
                unit=unit,
                size=(side, side),
                samples=size,
                bytes=facts["bytes"],
                sha256=facts["sha256"],
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )
        units.append(
            UnitEntry(
                source=f"{unit:05d}.tar", source_sha256="c" * 64, source_bytes=1, read=size, accepted=size, rejected={}
            )
        )
    manifest = Manifest(
        contract=contract(
            vae_sha256="",
            text_sha256="",
            resolution=side,
            buckets=((side, side),),
            latent_shape=(3, side, side),
            downsampling=1,
            scale=1.0,
            shift=0.0,
            stored="pixels",
            caption_key="",
            text=None,
            members=(Member(name="pixels", shape=(3, side, side), dtype="uint8"),),
            conditions=Conditions(),
        ),
        units=tuple(units),
        shards=tuple(entries),
        uncond_sha256="",
        statistics=Statistics(mean=tuple(moments.mean.tolist()), std=tuple(moments.std.tolist())),
        sources=("{00000..00009}.tar",),
    )
    commit_manifest(storage, manifest)
    return manifest


def autoencoder_config(folder: Path, architecture: FirstStageConfig = KL, **changes: Any) -> AutoencoderConfig:
    """Of a run folder/run on folder/pixels."""
    fields: dict[str, Any] = {
        "run": str(folder / "run"),
        "data": DataConfig(train=str(folder / "pixels")),
        "autoencoder": architecture,
        "optim": OptimConfig(batch=BATCH, betas=(0.5, 0.9), weight_decay=0.0),
        "tracking": TrackingConfig(wandb="off"),
        "samples": 128,
        "seed": 3,
    }
    return AutoencoderConfig(**{**fields, **changes})


def make_module(config: AutoencoderConfig) -> TrainableAutoencoder:
    """Seeded weights. Its codes are apart as those of a trained one are."""
    module = TrainableAutoencoder(config.autoencoder, config.gan)
    module.reset_parameters(config.seed)
    if config.autoencoder.regularizer == "vq":
        with torch.no_grad():
            module.codebook.mul_(config.autoencoder.codes)
    return module


def make_autoencoder_run(
    folder: Path,
    architecture: FirstStageConfig = KL,
    n: int = 128,
    kept: dict[str, float] | None = None,
    **changes: Any,
) -> AutoencoderConfig:
    """Makes a run directory folder/run with one commit; folder/pixels must exist. The raw weights are twice the EMA,
    which is of the autoencoder alone. kept: further averages by kind, as multiples of the EMA."""
    config = autoencoder_config(folder, architecture, **changes)
    run, digest = open_storage(config.run), _describe(config)
    state = dict(make_module(config).named_parameters())
    fragments = {
        kind: [
            Fragment(name, 0, factor * tensor.detach().reshape(-1))
            for name, tensor in state.items()
            if kind == "weights" or name.startswith(AVERAGED)
        ]
        for kind, factor in {"ema": 1.0, "weights": 2.0, **(kept or {})}.items()
    }
    shapes = {name: tensor.shape for name, tensor in state.items()}
    stamp = Stamp("torch", fixed_keys(config), {"train": digest}, shapes)
    save_now(run, World(), fragments, n=n, steps=n // BATCH, stamp=stamp)
    return config


def _describe(config: AutoencoderConfig) -> str:
    """Writes config.yaml and run.json; returns the digest of the training cache's manifest."""
    from pipeline.data.format.manifest import load_manifest

    manifest = load_manifest(open_storage(config.data.train))
    describe_run(config, open_storage(config.run), manifest, {"train": manifest.digest})
    return manifest.digest
