"""From the array that a cache holds of an image to the scaled latent z that a network is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.diffusion.posterior import sample_posterior


class Stored(Protocol):
    """Facts of a cache's images (data/format/contract.py, Contract)."""

    @property
    def stored(self) -> str: ...
    @property
    def scale(self) -> float: ...
    @property
    def shift(self) -> float: ...


@dataclass(frozen=True)
class Latents:
    """member: the name of the array: moments (B, 2C, h, w), posterior mean and log-variance; latents (B, C, h, w),
    unscaled; or pixels (B, 3, H, W) uint8. z = (value - shift) * scale; pixels are brought to the range of -1 to 1
    first."""

    member: str
    scale: float
    shift: float

    @classmethod
    def of(cls, contract: Stored) -> Latents:
        """Those of a cache."""
        return cls(contract.stored, contract.scale, contract.shift)

    def shape(self, array: Tensor) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an array (B, ...)."""
        channels, height, width = array.shape[1:]
        return (channels // 2 if self.member == "moments" else channels, height, width)

    def draw(self, array: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents (B, C, h, w) float32. noise: standard normals of that shape, for a sample of the posterior;
        None for its mode. What has no variance needs none."""
        if self.member == "moments":
            return sample_posterior(array, noise, self.scale, self.shift)
        values = array.float()
        if self.member == "pixels":
            values = values.div(127.5).sub(1)
        return (values - self.shift) * self.scale
