"""The task without conditioning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.models.tasks.task import Task


class Unconditional(Task):
    """No conditioning at all."""

    def __init__(self, latent_shape: tuple[int, int, int], empty_LD: Tensor | None, trimmed: bool = False) -> None:
        super().__init__()

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        return Conditioning()

    def null(self, batch_size: int, device: torch.device | str) -> Conditioning:
        return Conditioning()
