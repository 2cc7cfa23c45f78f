"""Sampling: from noise to a latent in a few denoising steps, with classifier-free guidance.

A sampler is a function of (predict, levels, x): `predict(x, level) -> x_0`, and the noise levels that it visits. It
relies only on x = alpha x_0 + sigma noise, so it serves every process. An image's initial noise is a pure function of
(seed, image number), so a set of images may be split into batches anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import Guidance, guide
from pipeline.diffusion.hooks import Keep, Start, Steer, steered
from pipeline.diffusion.levels import Level, first_spread, levels_for
from pipeline.diffusion.prediction import make_prediction
from pipeline.diffusion.process import PROCESSES
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.errors import RunError
from pipeline.philox import Stream


def initial_noise(
    seed: int, numbers_B: Tensor, latent_shape: tuple[int, int, int], device: torch.device | str | None = None
) -> Tensor:
    """The initial noise of the images numbered `numbers_B` (int64): (B, C, h, w) float32 normals."""
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
    start: Start | None = None,
    keep: Keep | None = None,
    steer: Sequence[Steer] = (),
) -> Tensor:
    """Latents (B, C, h, w), scaled as in training, from noise of that shape.

    denoise(x, timestep_B, conditioning): the network's raw prediction (a Denoiser).
    guidance: all settings, or only a scale w, which combines predictions as null + w (conditional - null) (Ho &
    Salimans 2022). Both come from one pass of 2B rows; scale 1 needs no null and has no second half.
    null: the conditioning of a negative prompt, or the null conditioning.
    start: an image to begin from. keep: a region that stays as it is in an image. steer: scores whose gradients are
    followed; `denoise` then has to have gradients. keep has the last word on x_0.
    Raises ConfigError for a number of steps that the sampler cannot take, RunError for a score without a gradient, and
    for a network without one where a score reads what it predicts.
    """
    levels, parameterization = levels_for(config, sampler, steps), make_prediction(config)
    settings = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    assert null is not None or settings.scale == 1.0, "guidance needs the null conditioning"
    # An empty context cache: the context is projected once for all steps.
    cached_conditioning = replace(conditioning, context_cache={})
    guided_conditioning = None
    if null is not None and settings.scale != 1.0:
        guided_conditioning = replace(conditioning.cat(null), context_cache={})
    variance_preserving = PROCESSES[config.prediction] == "discrete"

    def predict_x0(x: Tensor, level: Level) -> Tensor:
        guided = guided_conditioning if settings.applies(level) else None
        network_input = parameterization.scale(x, level.sigma)
        network_input = network_input if guided is None else torch.cat([network_input, network_input])
        dtype = torch.int64 if isinstance(level.timestep, int) else torch.float32
        timestep = torch.full((len(network_input),), level.timestep, dtype=dtype, device=x.device)
        prediction = denoise(network_input, timestep, cached_conditioning if guided is None else guided).float()
        if torch.is_grad_enabled() and x.requires_grad and not prediction.requires_grad:
            raise RunError(  # x_0 has a gradient all the same, that of x alone
                "a guide reads what the network predicts, and the prediction has no gradient by the image, so images "
                "would be guided wrongly: the network's weights are packed for prediction, or it runs without gradients"
            )
        prediction = prediction if guided is None else guide(prediction, settings)
        return parameterization.to_x0(prediction, x, level.alpha, level.sigma)

    guided_x0 = steered(predict_x0, steer)

    def predict(x: Tensor, level: Level) -> Tensor:
        # A variance-preserving network was trained on inputs of variance 1.
        std = math.hypot(level.alpha, level.sigma) if variance_preserving else 1.0
        x0 = guided_x0(x / std, replace(level, alpha=level.alpha / std, sigma=level.sigma / std))
        return x0 if keep is None else keep(x0)

    if start is not None:
        levels = start.levels(levels)
        return SAMPLERS[sampler](predict, levels, start.x(levels[0], noise_BCHW))
    return SAMPLERS[sampler](predict, levels, first_spread(config, levels[0]) * noise_BCHW)
