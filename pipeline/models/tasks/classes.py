"""The task of class-conditional images (Rombach et al. 2021, section 4.3.2 and table 13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.config import ClassTask, ModelConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.diffusion.conditioning import Conditioning
from pipeline.errors import ConfigError
from pipeline.models.tasks.task import Task


class Classes(Task):
    """A class as a context of one learned token, or as a learned vector beside the timestep. The last row of the
    embedding is the null class."""

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        assert isinstance(config, ClassTask), config
        facts = cache.conditions.classes
        if facts is None:
            raise ConfigError("task=class needs a cache with classes: encode it with conditions=[class]")
        self.as_token, self.count = config.mode == "token", facts.count
        self.embed = nn.Embedding(facts.count + 1, model.context_width if self.as_token else model.vector_width)

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        vector = self.embed(batch["cond.class"].long())
        return Conditioning(context=vector[:, None]) if self.as_token else Conditioning(vector=vector)

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "cond.class": torch.full_like(batch["cond.class"], self.count)}
