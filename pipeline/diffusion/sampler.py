"""Samplers: from noise to a latent in a few denoising steps, with classifier-free guidance.

A sampler is a function of (predict, levels, x): `predict(x, level) -> x_0`, and the noise levels to walk through. It
knows x = alpha x_0 + sigma noise alone, so it serves every process. Which noise an image starts from is a pure function
of (seed, image number), so batches may be cut anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.levels import Level, levels_for
from pipeline.diffusion.prediction import make_prediction, to_eps
from pipeline.models.conditioning import Conditioning
from pipeline.philox import Stream

Predict = Callable[[Tensor, Level], Tensor]


# --------------------------------------------------------------------------------------------------------------------
# Samplers


def ddim(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, equation 12 with sigma = 0): first order, one prediction a step.

    It is Euler's method on the flow of rectified flow and of Karras et al. 2022 (algorithm 1 without its correction).
    """
    for now, then in itertools.pairwise(levels):
        x0 = predict(x, now)
        x = then.alpha * x0 + then.sigma * to_eps(x0, x, now.alpha, now.sigma)
    return x


def dpmpp_2m(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order by remembering the last prediction.

    The first step has no memory and a last step to zero noise has no second order; both are DDIM's, and so is the step
    after one from no signal at all (h = infinity).
    """
    last_x0, last_h = None, 0.0
    for now, then in itertools.pairwise(levels):
        x0 = predict(x, now)
        h = then.log_snr - now.log_snr
        slope = x0
        if last_x0 is not None and then.sigma > 0:
            slope = x0 + (x0 - last_x0) * (h / (2 * last_h))  # D_i, with r = last_h / h
        x = (then.sigma / now.sigma) * x - then.alpha * math.expm1(-h) * slope
        last_x0, last_h = x0, h
    return x


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


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
    guidance: float = 1.0,
) -> Tensor:
    """Latents (B, C, h, w), scaled as in training, from noise of that shape.

    denoise(x, timestep_B, conditioning): the network's raw prediction (a Denoiser does).
    guidance w mixes predictions as null + w (conditional - null) (Ho & Salimans 2022), both from one pass of 2B rows;
    1 needs no null and makes no second half. Raises ConfigError for numbers of steps that a sampler cannot take.
    """
    levels, meaning = levels_for(config, sampler, steps), make_prediction(config)
    guided = guidance != 1.0
    if guided:
        assert null is not None, "guidance needs the null conditioning"
        conditioning = conditioning.cat(null)
    conditioning = replace(conditioning, known={})  # the context is projected once for all steps

    def predict(x: Tensor, level: Level) -> Tensor:
        scaled = meaning.scale(x, level.sigma)
        rows = torch.cat([scaled, scaled]) if guided else scaled
        dtype = torch.int64 if isinstance(level.timestep, int) else torch.float32
        timestep = torch.full((len(rows),), level.timestep, dtype=dtype, device=x.device)
        prediction = denoise(rows, timestep, conditioning).float()
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        return meaning.to_x0(prediction, x, level.alpha, level.sigma)

    spread = math.hypot(levels[0].alpha, levels[0].sigma)  # of x there, when latents have variance 1
    return SAMPLERS[sampler](predict, levels, spread * noise_BCHW)
