"""The task without conditioning."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.models.tasks.task import Task


class Unconditional(Task):
    """No conditioning at all."""

    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        return Conditioning()
