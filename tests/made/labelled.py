"""Makes a small cache of latents that show their class, without encoders and captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from made.cache import contract as make_contract
from made.cache import write_unit
from pipeline.conditions.facts import ClassFacts, Conditions
from pipeline.config import (
    CheckpointConfig,
    ClassifierTask,
    DataConfig,
    DeepSpeedConfig,
    DiffusionConfig,
    EmaConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    SamplerConfig,
    TrackingConfig,
    TrainConfig,
)
from pipeline.data.format.contract import Contract
from pipeline.data.format.manifest import Manifest, Statistics, commit_manifest
from pipeline.data.format.members import arrays_of
from pipeline.data.format.records import Record, record_key
from pipeline.storage.urls import open_storage

CLASSES, SIDE = 4, 4
BATCH, EVERY, END = 16, 64, 320
MODEL = ModelConfig(channels=16, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, norm_groups=4, context_width=0)


def labelled_contract(classes: int = CLASSES, **changes: Any) -> Contract:
    """A contract without captions. classes: 0 for none."""
    facts = ClassFacts(count=classes, names=tuple(f"kind {k}" for k in range(classes))) if classes else None
    contract = make_contract(
        **{
            "resolution": 8 * SIDE,
            "buckets": ((8 * SIDE, 8 * SIDE),),
            "latent_shape": (4, SIDE, SIDE),
            "text": None,
            "text_sha256": "",
            "caption_key": "",
            "conditions": Conditions(classes=facts),
            **changes,
        }
    )
    return replace(contract, members=arrays_of(contract))


def make_labelled(url: str, records: int, classes: int = CLASSES, seed: int = 0, **changes: Any) -> Manifest:
    """Writes a cache of two shards. Record i is of class i modulo their number, and its scaled latent is a pattern of
    the class with a little noise. changes: of the contract."""
    contract = labelled_contract(classes, **changes)
    patterns = np.random.default_rng(7).standard_normal((max(classes, 1), 4, SIDE, SIDE))
    rng, written = np.random.default_rng(seed), []
    for unit, numbers in enumerate(np.array_split(np.arange(records), 2)):
        rows = []
        for row, number in enumerate(numbers):
            k = int(number) % max(classes, 1)
            z = patterns[k] + 0.3 * rng.standard_normal(patterns[k].shape)
            moments = np.concatenate([z / contract.scale + contract.shift, np.full_like(z, -8.0)])
            members: dict[str, np.ndarray] = {"moments": moments.astype(np.float16)}
            members |= {"cond.class": np.array(k, np.int32)} if classes else {}
            rows.append(Record(record_key(unit, row), members, {"key": f"source/{seed}.{number}"}))
        written.append(write_unit(open_storage(url), unit, (8 * SIDE, 8 * SIDE), rows, {}))
    shards, units = zip(*written, strict=True)
    manifest = Manifest(
        contract=contract,
        units=tuple(replace(entry, source_sha256=f"{seed:x}".rjust(63, "c") + f"{i}") for i, entry in enumerate(units)),
        shards=shards,
        uncond_sha256="",
        statistics=Statistics(mean=(0.0,) * 4, std=(1.0,) * 4),
        sources=(f"labelled-{seed}",),
    )
    commit_manifest(open_storage(url), manifest)
    return manifest


def labelled_config(folder: Path, run: str = "run", **changes: Any) -> TrainConfig:
    """A classifier's run folder/RUN on folder/cache, measured on folder/val."""
    fields: dict[str, Any] = {
        "run": str(folder / run),
        "seed": 3,
        "data": DataConfig(train=str(folder / "cache"), val=str(folder / "val")),
        "model": MODEL,
        "task": ClassifierTask(),
        "diffusion": DiffusionConfig(prediction="v", timestep_sampling="stratified"),
        "optim": OptimConfig(name="muon", lr=1e-2, warmup=32, batch=BATCH),
        "ema": EmaConfig(half_life=32.0),
        "deepspeed": DeepSpeedConfig(engine="torch"),
        "checkpoint": CheckpointConfig(every=EVERY, keep=20, best="task"),
        "eval": EvalConfig(images=32, loss_images=16, sampler=SamplerConfig(sampler="unipc", steps=8)),
        "tracking": TrackingConfig(wandb="off", every=BATCH),
        "samples": END,
        "device": "cpu",
        "launch": LaunchConfig(threads=1),
    }
    return TrainConfig(**{**fields, **changes})
