"""Samplers: from noise to a latent in a few denoising steps, with classifier-free guidance.

A sampler is a function of (predict, levels, x): `predict(x, level) -> x_0`, and the noise levels to walk through. It
knows x = alpha x_0 + sigma noise alone, so it serves every process. Which noise an image starts from is a pure function
of (seed, image number), so batches may be cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import Guidance, guide
from pipeline.diffusion.levels import Level, first_spread, levels_for
from pipeline.diffusion.prediction import make_prediction
from pipeline.diffusion.process import PROCESSES
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.philox import Stream

# --------------------------------------------------------------------------------------------------------------------
# Samplers


# --------------------------------------------------------------------------------------------------------------------
# Sampling


def initial_noise(
    seed: int, numbers_B: Tensor, latent_shape: tuple[int, int, int], device: torch.device | str | None = None
) -> Tensor:
    """What the images numbered `numbers_B` (int64) start from: (B, C, h, w) float32 normals."""
    return philox.normal(seed, Stream.SAMPLER, numbers_B.to(device or numbers_B.device), latent_shape)


@torch.no_grad()
def sample(
    denoise: Callable[[Tensor, Tensor, Conditioning], Tensor],
    config: DiffusionConfig,
    noise_BCHW: Tensor,
    conditioning: Conditioning,
    null: Conditioning | None = None,
    *,
    sampler: str = "dpmpp_2m",
    steps: int = 20,
    guidance: float | Guidance = 1.0,
) -> Tensor:
    """Latents (B, C, h, w), scaled as in training, from noise of that shape.

    denoise(x, timestep_B, conditioning): the network's raw prediction (a Denoiser does).
    guidance: a scale w, which mixes predictions as null + w (conditional - null) (Ho & Salimans 2022), both from one
    pass of 2B rows, or all of its settings; 1 needs no null and makes no second half. null: of a negative prompt, or
    what says nothing. Raises ConfigError for numbers of steps that a sampler cannot take.
    """
    levels, meaning = levels_for(config, sampler, steps), make_prediction(config)
    settings = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    assert null is not None or settings.scale == 1.0, "guidance needs the null conditioning"
    both = replace(conditioning.cat(null), known={}) if null is not None and settings.scale != 1.0 else None
    alone = replace(conditioning, known={})  # the context is projected once for all steps
    preserving = PROCESSES[config.prediction] == "discrete"

    def predict(x: Tensor, level: Level) -> Tensor:
        size = math.hypot(level.alpha, level.sigma) if preserving else 1.0  # the network knows latents of variance 1
        x, alpha, sigma = x / size, level.alpha / size, level.sigma / size
        guided = both is not None and settings.applies(level)
        rows = meaning.scale(x, sigma)
        rows = torch.cat([rows, rows]) if guided else rows
        dtype = torch.int64 if isinstance(level.timestep, int) else torch.float32
        timestep = torch.full((len(rows),), level.timestep, dtype=dtype, device=x.device)
        prediction = denoise(rows, timestep, both if guided and both is not None else alone).float()
        return meaning.to_x0(guide(prediction, settings) if guided else prediction, x, alpha, sigma)

    return SAMPLERS[sampler](predict, levels, first_spread(config, levels[0]) * noise_BCHW)
