"""The small networks of several widths, depths and sizes to whose steps a calibration is fitted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pipeline.config import ModelConfig
from pipeline.planning.cost import Cost, unet_cost
from pipeline.planning.rates.calibration import Optimizer


@dataclass(frozen=True)
class Reference:
    """A UNet to measure. side: of its latents; tokens: of its context, 0 without one; images: of a step and rank."""

    model: ModelConfig
    side: int
    tokens: int
    images: int
    optimizer: Optimizer = "adamw"

    @property
    def name(self) -> str:
        """What it is called, for people."""
        return f"{self.model.name}, {self.side}x{self.side}, {self.images} images, {self.optimizer}"

    def cost(self) -> Cost:
        """Of a step of one rank."""
        return unet_cost(self.model, self.images, self.side, self.side, self.tokens)


_small = partial(ModelConfig, multipliers=(1, 2), blocks=1, heads=4, norm_groups=8)
NARROW = _small(name="32 channels", channels=32, multipliers=(1, 2, 2), attention=(1, 2, 4), context_width=64)
SPARSE = _small(name="96 channels", channels=96, attention=(2,), context_width=96)
DEEP = _small(name="48 channels, deep", channels=48, multipliers=(1, 2, 4), blocks=2, attention=(2, 4), context_width=0)
LARGE = _small(name="56 channels, large latents", channels=56, attention=(), context_width=0)
WIDE = _small(name="160 channels", channels=160, attention=(1, 2), context_width=128)
EVEN = _small(name="80 channels", channels=80, multipliers=(1, 1), attention=(1, 2), context_width=64)

REFERENCES = {
    "cpu": (
        Reference(NARROW, 8, 32, 24),
        Reference(SPARSE, 8, 24, 6),
        Reference(SPARSE, 8, 24, 20),
        Reference(DEEP, 16, 0, 3),
        Reference(LARGE, 32, 0, 2),
        Reference(WIDE, 8, 32, 4),
        Reference(EVEN, 8, 16, 12, "muon"),
        Reference(NARROW, 8, 32, 24, "muon"),
    ),
    "cuda": (
        Reference(_small(name="128 channels", channels=128, attention=(1, 2), context_width=256), 32, 77, 64),
        Reference(_small(name="256 channels", channels=256, attention=(1, 2), context_width=512), 32, 77, 64),
        Reference(
            _small(name="192 channels", channels=192, multipliers=(1, 2, 4), attention=(2, 4), context_width=768),
            64,
            77,
            16,
        ),
        Reference(_small(name="320 channels", channels=320, attention=(2,), context_width=0), 64, 0, 8),
        Reference(_small(name="64 channels", channels=64, attention=(1, 2), context_width=128), 16, 32, 256),
        Reference(_small(name="256 channels", channels=256, attention=(1, 2), context_width=512), 32, 77, 16, "muon"),
    ),
}
"""By kind of device: a tenth of a second to half a second a step and rank on CPUs of 2020 and later."""
