"""The task of semantic synthesis: a label map (Rombach et al. 2021, section 4.3.2 and table 15)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import ModelConfig, SemanticTask, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError
from pipeline.models.tasks.task import Task


class Semantic(Task):
    """A learned vector for each label, concatenated: those of all cells of a latent position, or their mean.

    An embedding of labels is a 1x1 convolution of their one-hot planes, which are never made. The last row is the null
    label.
    """

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        assert isinstance(config, SemanticTask), config
        facts = cache.conditions.labels
        if facts is None:
            raise ConfigError("task=semantic needs a cache with label maps: encode it with conditions=[labels]")
        self.grid, self.count, self.shuffle = facts.grid, facts.count, config.labels == "shuffle"
        self.embed = nn.Embedding(facts.count + 1, config.width)

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        planes = self.embed(batch["cond.labels"].long()).permute(0, 3, 1, 2)
        return Conditioning(
            concat=F.pixel_unshuffle(planes, self.grid) if self.shuffle else F.avg_pool2d(planes, self.grid)
        )

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["cond.labels"]
        return {**batch, "cond.labels": torch.full(labels.shape, self.count, dtype=torch.int32, device=labels.device)}
