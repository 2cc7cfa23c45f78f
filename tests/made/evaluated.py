"""Evaluations of conditions and pictures in memory: a cache whose latents are its pixels, and a small denoiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from made.cache import contract
from made.judged import CONDITIONS, given, pictures, scenes
from pipeline.config import DiffusionConfig, ModelConfig, TaskConfig
from pipeline.data.format.contract import Contract
from pipeline.evaluation.evaluate import Evaluator
from pipeline.evaluation.tasks.judge import make_judge
from pipeline.evaluation.validation import Validation
from pipeline.models.denoiser import Denoiser
from pipeline.models.tasks.choose import make_task
from preprocess.shapes.drawing import label_map

RECORDS = 6


class Identity:
    """A first stage that keeps pixels as they are."""

    device = torch.device("cpu")
    dtype = torch.float32
    weights_sha256 = "a" * 64

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def of_pixels(**changes: Any) -> Contract:
    """The contract of a cache without captions, whose latents are the pixels."""
    facts: dict[str, Any] = {
        "conditions": replace(CONDITIONS, labels=replace(CONDITIONS.labels, grid=1)),  # type: ignore[type-var]
        "resolution": 64,
        "buckets": ((64, 64),),
        "latent_shape": (3, 64, 64),
        "downsampling": 1,
        "scale": 1.0,
        "shift": 0.0,
        "stored": "latents",
        "text": None,
        "text_sha256": "",
        "caption_key": "",
    }
    return contract(**{**facts, **changes})


def in_memory(cache: Contract, records: int = RECORDS) -> Validation:
    """The first records of such a cache."""
    arrays = {name: rows[:records] for name, rows in given().members.items()}
    arrays["cond.labels"] = np.stack([label_map(truth) for truth in scenes()[:records]])
    pixels = np.ascontiguousarray(pictures()[:records].transpose(0, 3, 1, 2))
    arrays |= {"pixels": pixels, "latents": (pixels / 127.5 - 1).astype(np.float16)}
    arrays["cond.masked"] = arrays["latents"] * (1 - np.unpackbits(arrays["cond.mask"], axis=-1)[:, None])
    return Validation("d" * 64, cache, [""] * records, arrays)


def denoiser_of(task: TaskConfig, cache: Contract) -> Denoiser:
    torch.manual_seed(0)
    width = 32 if task.makes_context else 0
    model = ModelConfig(
        channels=32,
        multipliers=(1,),
        blocks=1,
        attention=(),
        heads=1,
        in_channels=3,
        out_channels=3,
        context_width=width,
    )
    denoiser = Denoiser(model, make_task(task, model, cache))
    denoiser.reset_parameters(0)
    return denoiser


def evaluator_of(task: TaskConfig, cache: Contract, validation: Validation, **settings: Any) -> Evaluator:
    return Evaluator(
        validation=validation,
        first_stage=Identity(),  # type: ignore[arg-type]
        tower=None,
        diffusion=DiffusionConfig(),
        judge=settings.pop("judge", None) or make_judge(cache, task),
        grid=3,
        **settings,
    )
