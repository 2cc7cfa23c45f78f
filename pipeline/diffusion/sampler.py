"""Samplers: from noise to a latent in a few denoising steps, with classifier-free guidance.

A sampler is a function of (predict, levels, x): `predict(x, level) -> x_0`, and the noise levels to walk through. Which
noise an image starts from is a pure function of (seed, image number), so batches may be cut anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.objective import TO_X0, to_eps
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.models.conditioning import Conditioning
from pipeline.philox import Stream


@dataclass(frozen=True)
class Level:
    """One noise level: x = alpha x_0 + sigma noise, at a timestep of the training process (-1: none, the end)."""

    timestep: int
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma) (Lu et al. 2022); infinite without noise."""
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


Predict = Callable[[Tensor, Level], Tensor]


# --------------------------------------------------------------------------------------------------------------------
# Samplers


def ddim(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, equation 12 with sigma = 0): first order, one prediction a step."""
    for now, then in itertools.pairwise(levels):
        x0 = predict(x, now)
        x = then.alpha * x0 + then.sigma * to_eps(x0, x, now.alpha, now.sigma)
    return x


def dpmpp_2m(predict: Predict, levels: list[Level], x: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order by remembering the last prediction.

    The first step has no memory and a last step to zero noise has no second order; both are DDIM's.
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


def leading_levels(schedule: Schedule, steps: int) -> list[Level]:
    """1, 1 + T/steps, 1 + 2T/steps, ... backwards, then timestep 0: as Stable Diffusion's DDIM walks."""
    stride = schedule.timesteps // steps
    timesteps = [1 + i * stride for i in reversed(range(steps))] + [0]
    if stride == 0 or not 0.75 * schedule.timesteps <= timesteps[0] < schedule.timesteps:
        raise ConfigError(
            f"ddim with {steps} steps would start at timestep {timesteps[0]} of {schedule.timesteps}, not at noise: "
            f"choose a number of steps that divides {schedule.timesteps}, at most {schedule.timesteps // 2}"
        )
    return [_level(schedule, t) for t in timesteps]


def even_levels(schedule: Schedule, steps: int) -> list[Level]:
    """From T - 1 down in `steps` equal strides, rounded, and then to no noise at all ("linspace" in diffusers)."""
    if steps >= schedule.timesteps:
        raise ConfigError(f"dpmpp_2m takes fewer steps than there are timesteps ({schedule.timesteps}), not {steps}")
    timesteps = np.linspace(0, schedule.timesteps - 1, steps + 1).round().astype(int)[:0:-1]
    return [_level(schedule, int(t)) for t in timesteps] + [Level(-1, 1.0, 0.0)]


def _level(schedule: Schedule, timestep: int) -> Level:
    alpha_bar = float(schedule.alpha_bar[timestep])
    return Level(timestep, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}
LEVELS = {"ddim": leading_levels, "dpmpp_2m": even_levels}


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
    if steps < 1:
        raise ConfigError(f"steps={steps}: at least one denoising step")
    guided = guidance != 1.0
    if guided:
        assert null is not None, "guidance needs the null conditioning"
        conditioning = conditioning.cat(null)

    def predict(x: Tensor, level: Level) -> Tensor:
        rows = torch.cat([x, x]) if guided else x
        timestep = torch.full((len(rows),), level.timestep, dtype=torch.int64, device=x.device)
        prediction = denoise(rows, timestep, conditioning).float()
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        return TO_X0[config.prediction](prediction, x, level.alpha, level.sigma)

    return SAMPLERS[sampler](predict, LEVELS[sampler](Schedule(config), steps), noise_BCHW)
