"""From noise to 8-bit pictures, and between pixels (uint8) and the networks' range (-1 to 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import DiffusionConfig, SamplerConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.guidance import Guidance
from pipeline.diffusion.hooks import NO_HOOKS, Hooks
from pipeline.diffusion.sampling import initial_noise, sample
from pipeline.errors import ConfigError
from pipeline.inference.tiles.denoise import TiledDenoiser
from pipeline.models.denoiser import Denoiser
from pipeline.models.encoders.first_stage import FirstStage


def to_uint8(x_BCHW: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded to the nearest level; NaN becomes black."""
    levels = ((x_BCHW.float().nan_to_num(nan=-1.0) + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images_BHWC: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images_BHWC)).permute(0, 3, 1, 2)
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def conditionings(
    denoiser: Denoiser | TiledDenoiser,
    batch: Mapping[str, Tensor],
    sampler: SamplerConfig,
    negative: Mapping[str, Tensor] | None = None,
) -> tuple[Conditioning, Conditioning | None]:
    """The conditioning of a batch that the task has prepared, and the null conditioning where guidance wants it.
    negative: members that take the place of those that say nothing, such as a negative prompt's."""
    task = denoiser.task
    with torch.no_grad():
        return task(batch), task({**task.null(batch), **(negative or {})}) if sampler.guidance != 1 else None


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside the context. Afterwards each submodule has its previous mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def draw(
    denoiser: Denoiser | TiledDenoiser,
    first_stage: FirstStage,
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    conditioning: Conditioning,
    numbers: list[int],
    seed: int,
    latent_shape: tuple[int, int, int],
    device: torch.device,
    null: Conditioning | None = None,
    hooks: Hooks = NO_HOOKS,
) -> tuple[np.ndarray, int]:
    """Sample the images numbered `numbers`, one for each row of the conditioning.

    null: the conditioning that guidance leads away from; without guidance None will do. hooks: an image to begin from,
    a region to keep, scores to follow; for scores `denoiser` is not packed.
    Image i starts from the noise of (seed, i). Returns (B, H, W, 3) uint8 and the number of images that were not
    finite.
    """
    if hooks.steer and isinstance(denoiser, TiledDenoiser):
        raise ConfigError("tile= goes with no guide, whose gradient needs whole pictures: leave one of them out")
    noise = initial_noise(seed, torch.tensor(numbers, dtype=torch.int64), latent_shape, device)
    with frozen(denoiser):
        latents = sample(
            denoiser,
            diffusion,
            noise,
            conditioning,
            null,
            sampler=sampler.sampler,
            steps=sampler.steps,
            guidance=Guidance.from_config(sampler),
            start=hooks.start,
            keep=hooks.keep,
            steer=hooks.steer,
        )
        x_BCHW = first_stage.decode(latents)
    not_finite = int((~torch.isfinite(latents).flatten(1).all(1)).sum())
    return to_uint8(x_BCHW), not_finite
