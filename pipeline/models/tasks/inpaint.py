"""The task of inpainting (Rombach et al. 2021, section 4.5; Stable Diffusion's inpainting models)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import InpaintTask, ModelConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError
from pipeline.models.tasks.captions import Captioned
from pipeline.models.tasks.task import Visit, pick_variant


class Inpaint(Captioned):
    """The mask at the latent's size and the masked image's latent, concatenated in the order and range that the cache's
    contract says. A mask is 1 inside of the hole."""

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        assert isinstance(config, InpaintTask), config
        facts = cache.conditions.mask
        if facts is None:
            raise ConfigError("task=inpaint needs a cache with masks: encode it with conditions=[mask]")
        self.facts, self.downsampling = facts, cache.downsampling
        self.scale, self.shift = cache.scale, cache.shift

    def drawn(self, batch: Mapping[str, Tensor], visit: Visit) -> dict[str, Tensor]:
        mask, masked = (
            pick_variant(batch[name], self.facts.variants, visit.seed, visit.numbers_B)
            for name in ("cond.mask", "cond.masked")
        )
        return {"cond.mask": self._at_latents(mask, masked.shape[-2:]), "cond.masked": masked}

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        context, mask = self.context(batch)
        masked = (batch["cond.masked"].float() - self.shift) * self.scale
        hidden = batch["cond.mask"].float() * (1 - self.facts.low) + self.facts.low
        parts = [hidden, masked] if self.facts.order == "mask_masked" else [masked, hidden]
        return Conditioning(context, mask, torch.cat(parts, dim=1))

    def _at_latents(self, mask: Tensor, sides: torch.Size) -> Tensor:
        """The mask of pixels (B, H, W), or eight to a byte, as (B, 1, h, w) float32: 0 or 1."""
        factor = self.downsampling
        if self.facts.packed:
            mask = unpacked(mask, sides[1] * factor)
        mask = mask[:, None].float()
        return F.max_pool2d(mask, factor) if self.facts.pooling == "max" else mask[..., ::factor, ::factor]


def unpacked(packed: Tensor, width: int) -> Tensor:
    """Bits (..., ceil(W / 8)) uint8, the first in the highest place, as (..., W) uint8 of 0 and 1."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> places) & 1).flatten(-2)[..., :width]
