"""Makes runs of every task without a cache, for tests of what `latentmill sample` may be asked for.

Encoders and denoiser have seeded random weights; the run's contract is that of a cache which `encode` would write.
"""

from __future__ import annotations

import dataclasses
import io
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from made.commits import save_now
from pipeline.conditions.facts import BoxFacts, ClassFacts, Conditions, LabelFacts, LowresFacts, MaskFacts
from pipeline.config import (
    DataConfig,
    EncodersConfig,
    FiltersConfig,
    LimitsConfig,
    ModelConfig,
    SampleConfig,
    SamplerConfig,
    TaskConfig,
    TrainConfig,
)
from pipeline.data.format.contract import Contract, Member, TextFacts, plain, stored_filters, stored_limits
from pipeline.data.format.contract_json import require_readable
from pipeline.data.format.members import arrays_of
from pipeline.distributed.world import World
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.autoencoder import load_autoencoder
from pipeline.models.encoders.first_stage import FirstStage
from pipeline.models.encoders.text import TextTower, load_text
from pipeline.models.tasks.choose import make_task
from pipeline.runs.directory import fixed_keys
from pipeline.runs.fragments import Fragment
from pipeline.storage.urls import open_storage
from pipeline.training.life import describe_run
from pipeline.training.saver import Stamp

ENCODERS = EncodersConfig(seed=1)
NAMES = tuple(f"{colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square", "star"))
CONDITIONS = Conditions(
    classes=ClassFacts(count=9, names=NAMES),
    boxes=BoxFacts(count=9, most=5, names=NAMES),
    labels=LabelFacts(count=10, grid=4),
    lowres=LowresFacts(factor=4, degradation="bicubic", variants=2),
    mask=MaskFacts(kinds=("rectangles",), variants=3),
)
"""Every condition; small images and masks in several variants."""
SINGLE = dataclasses.replace(
    CONDITIONS,
    lowres=LowresFacts(factor=4, degradation="bicubic"),
    mask=MaskFacts(kinds=("rectangles",)),
)
"""The same in one variant."""
SAMPLER = SamplerConfig(sampler="euler", steps=2, batch=3)


@cache
def encoders() -> tuple[FirstStage, TextTower]:
    return load_autoencoder(ENCODERS), load_text(ENCODERS)


@cache
def contract(*, text: str = "full", conditions: Conditions = CONDITIONS) -> Contract:
    """The contract of a cache of 64 x 64 crops. text: text_storage, or "" for a cache without captions."""
    stage, tower = encoders()
    facts = TextFacts(
        storage=text or "full",  # type: ignore[arg-type]
        layer=tower.layer,
        length=tower.length,
        width=tower.width,
        pad=tower.pad,
        eot=tower.eot,
        vocabulary=49408,
        start=49406,
    )
    made = Contract(
        encoders=plain(ENCODERS),
        vae_sha256=stage.weights_sha256,
        text_sha256=tower.weights_sha256 if text else "",
        resolution=64,
        buckets=((64, 64),),
        crop="centre",
        seed=0,
        flip=False,
        filters=stored_filters(FiltersConfig()),
        limits=stored_limits(LimitsConfig()),
        resize="lanczos",
        latent_shape=(stage.latent_channels, 8, 8),
        downsampling=stage.downsampling,
        scale=stage.scale,
        shift=stage.shift,
        caption_key="txt" if text else "",
        text=facts if text else None,
        conditions=conditions,
        members=(Member(name="moments", shape=(8, 8, 8), dtype="float16"),),
        batch=4,
        device="cpu",
        threads=1,
        versions={},
    )
    made = dataclasses.replace(made, members=arrays_of(made))
    require_readable(made)
    return made


def make_run(folder: Path, task: TaskConfig, cache: Contract | None = None) -> str:
    """Writes a run of one commit to folder/run, trained on a cache of this contract. Returns its path."""
    cache = cache or contract()
    model = ModelConfig(
        channels=32,
        multipliers=(1, 2),
        blocks=1,
        attention=(2,),
        heads=2,
        context_width=128 if task.makes_context else 0,
        vector_width=16 if task.makes_vector else 0,
    )
    config = TrainConfig(
        run=str(folder / "run"),
        data=DataConfig(train=str(folder / "cache")),
        model=model,
        task=task,
        samples=128,
    )
    denoiser = Denoiser(config.model, make_task(task, config.model, cache, torch.zeros(32, 128)))
    denoiser.reset_parameters(0)
    generator = torch.Generator().manual_seed(3)
    state = {name: t + torch.randn(t.shape, generator=generator) * 0.05 for name, t in denoiser.state_dict().items()}
    run = open_storage(config.run)
    describe_run(config, run, SimpleNamespace(samples=128, contract=cache), {"train": "a" * 64})  # type: ignore[arg-type]
    stamp = Stamp("torch", fixed_keys(config), {"train": "a" * 64}, {name: t.shape for name, t in state.items()})
    fragments = {kind: [Fragment(name, 0, t.reshape(-1)) for name, t in state.items()] for kind in ("ema", "weights")}
    save_now(run, World(), fragments, n=128, steps=2, stamp=stamp)
    return config.run


def sample_config(folder: Path, **asked: Any) -> SampleConfig:
    """Two images in each row, of the run in folder/run, to folder/out.png."""
    fields = {"run": str(folder / "run"), "n": 2, "dest": str(folder / "out.png"), "sampler": SAMPLER, "device": "cpu"}
    return SampleConfig(**{**fields, **asked})


def picture(path: Path, array: np.ndarray, **options: Any) -> str:
    """Writes an array of pixels, (H, W) or (H, W, 3) uint8, as a PNG. Returns its path."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", **options)
    path.write_bytes(file.getvalue())
    return str(path)


def boxes_file(path: Path, boxes: list[list[Any]]) -> str:
    """Writes boxes as JSON. Returns the path."""
    path.write_text(json.dumps(boxes))
    return str(path)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
