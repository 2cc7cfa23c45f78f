"""An eighth task: the share of classes below a sample's own, as one plane. This file and its row are all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig, TaskConfig
from pipeline.config.tasks.base import Cache
from pipeline.config.tasks.table import TASK_FACTS, TaskFacts
from pipeline.diffusion.conditioning import Conditioning
from pipeline.models.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class ToyTask(TaskConfig):
    """A plane whose brightness is the class."""

    name: Literal["toy"] = "toy"
    """toy: a plane."""

    members = ("cond.class",)
    conditions = ("class",)

    def channels(self, cache: Cache) -> int:
        return 1


class Toy(Task):
    """A plane of a learned brightness."""

    def __init__(self, config: TaskConfig, model: ModelConfig, cache: Cache, empty_LD: Tensor | None) -> None:
        super().__init__(config, model, cache, empty_LD)
        self.sides = cache.latent_shape[1:]
        self.scale = nn.Linear(1, 1)

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        share = batch["cond.class"].to(self.scale.weight.dtype)[:, None] / 24
        return Conditioning(concat=self.scale(share)[..., None, None].expand(-1, 1, *self.sides))

    def null(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "cond.class": torch.zeros_like(batch["cond.class"])}


ROW = TaskFacts(
    config=ToyTask,
    network="made.toy_task:Toy",
    judge=TASK_FACTS["unconditional"].judge,
    requests=TASK_FACTS["class"].requests,
    asks=TASK_FACTS["class"].asks,
    export=TASK_FACTS["unconditional"].export,
    recipe="shapes_class",
)


def add() -> None:
    """Add the row."""
    TASK_FACTS["toy"] = ROW
