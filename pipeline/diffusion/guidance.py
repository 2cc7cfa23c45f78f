"""Classifier-free guidance: how a conditional and a null prediction are combined, and at which noise levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import SamplerConfig
from pipeline.diffusion.levels import Level


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance.

    scale: w of null + w (conditional - null) (Ho & Salimans 2022, equation 6, whose w is one less); 1 = none.
    low, high: guidance is on only at noise levels low < sigma / alpha <= high (Kynkaanniemi et al. 2024, section 3);
    elsewhere the conditional prediction is used unchanged, at half the cost. 0 = no bound.
    rescale: phi of Lin et al. 2023, equations 15 and 16; 0 = none.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 0.0
    rescale: float = 0.0

    @classmethod
    def from_config(cls, config: SamplerConfig) -> Guidance:
        """The guidance settings of a sampler's configuration."""
        return cls(config.guidance, config.guidance_low, config.guidance_high, config.rescale)

    def applies(self, level: Level) -> bool:
        """Whether guidance is on at this noise level."""
        if self.scale == 1.0:
            return False
        return self.low * level.alpha < level.sigma and (not self.high or level.sigma <= self.high * level.alpha)


def guide(prediction: Tensor, settings: Guidance) -> Tensor:
    """Guided predictions (B, C, h, w) from predictions (2B, C, h, w): B conditional ones, then B null ones."""
    conditional, unconditional = prediction.chunk(2)
    mixed = unconditional + settings.scale * (conditional - unconditional)
    if not settings.rescale:
        return mixed
    conditional_std, mixed_std = (torch.std(x, dim=(1, 2, 3), keepdim=True) for x in (conditional, mixed))
    return settings.rescale * (mixed * (conditional_std / mixed_std)) + (1 - settings.rescale) * mixed
