"""The interface of a task, which conditions the UNet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning


class Task(nn.Module, ABC):
    """One way to condition the UNet; its parameters, if any, are trained with it.

    Built by make_task from the run's TaskConfig, the cache's latent shape and its encoded empty caption.
    """

    members: tuple[str, ...] = ()
    """Members of a cached record that `condition` reads, as in pipeline/config/tasks.py."""

    def in_channels(self, latent_channels: int) -> int:
        """Channels of the UNet's input: those of the latent and those that the task concatenates."""
        return latent_channels

    @abstractmethod
    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of a batch, from its members by name."""

    @abstractmethod
    def null(self, batch_size: int, device: torch.device | str) -> Conditioning:
        """The null conditioning: for dropped rows in training, and for the second half of guidance."""

    def drop(self, conditioning: Conditioning, mask_B: Tensor) -> Conditioning:
        """Replace the rows where mask_B (B,) bool is True by the null conditioning."""
        return conditioning.where(mask_B, self.null(len(mask_B), mask_B.device))

    def reset_parameters(self, seed: int) -> None:
        """Initialize the task's parameters; by default it has none."""
