"""The task of super-resolution (Rombach et al. 2021, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline import philox
from pipeline.config import ModelConfig, SuperresTask, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError
from pipeline.models.tasks.captions import Captioned
from pipeline.models.tasks.task import Visit, pick_variant
from pipeline.philox import Stream

LEVEL = "lowres.level"
"""Member of a batch, (B,) int64: the level of the noise that was added to the small image."""
LEVELS, FIRST_BETA, LAST_BETA = 1000, 1e-4, 2e-2


class Superres(Captioned):
    """The image at a lower resolution, concatenated at the latent's: several of its pixels side by side where it is
    larger, enlarged where it is smaller. With noise, its level is a learned vector (Ho et al. 2021, "Cascaded
    diffusion models", section 4)."""

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        assert isinstance(config, SuperresTask), config
        facts = cache.conditions.lowres
        if facts is None:
            raise ConfigError("task=superres needs a cache with small images: encode it with conditions=[lowres]")
        self.variants, self.noise = facts.variants, config.noise
        self.factor, self.downsampling = facts.factor, cache.downsampling
        self.embed_level = nn.Embedding(config.noise + 1, model.vector_width) if config.noise else None

    def drawn(self, batch: Mapping[str, Tensor], visit: Visit) -> dict[str, Tensor]:
        small = pick_variant(batch["cond.lowres"], self.variants, visit.seed, visit.numbers_B)
        small = small.float().div(127.5).sub(1)
        if not self.noise:
            return {"cond.lowres": small}
        level = batch.get(LEVEL)
        if level is None:
            words = philox.words(visit.seed, Stream.VARIANT, visit.numbers_B, 2)  # the first is the variant
            word = words[:, 1].to(small.device)
            level = word * (self.noise + 1) >> 32 if visit.training else torch.zeros_like(word)
        betas = torch.linspace(FIRST_BETA, LAST_BETA, LEVELS, dtype=torch.float64)
        kept = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])[level.cpu()].to(small.device)
        kept = kept.view(-1, 1, 1, 1).float()
        noise = philox.normal(visit.seed, Stream.AUGMENT, visit.numbers_B, small.shape[1:]).to(small)
        return {"cond.lowres": kept.sqrt() * small + (1 - kept).sqrt() * noise, LEVEL: level}

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        context, mask = self.context(batch)
        vector = None if self.embed_level is None else self.embed_level(batch[LEVEL].long())
        return Conditioning(context, mask, self._at_latents(batch["cond.lowres"]), vector)

    def _at_latents(self, small: Tensor) -> Tensor:
        """The small image (B, 3, H/factor, W/factor) at the size of the latent."""
        if self.factor < self.downsampling:
            return F.pixel_unshuffle(small, self.downsampling // self.factor)
        if self.factor > self.downsampling:
            larger = self.factor // self.downsampling
            return F.interpolate(small, scale_factor=larger, mode="bilinear", align_corners=False)
        return small
