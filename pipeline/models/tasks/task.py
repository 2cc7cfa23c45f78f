"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning


class Task(nn.Module, ABC):
    """One way to condition the UNet; its parameters, if any, train with it.

    Built by make_task from the run's TaskConfig, the cache's latent shape and its encoded empty caption.
    """

    members: tuple[str, ...] = ()
    """Members of a cached record that `condition` reads."""

    def in_channels(self, latent_channels: int) -> int:
        """Channels of the UNet's input: the latent's and those that the task concatenates."""
        return latent_channels

    @abstractmethod
    def condition(self, batch: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of a batch's rows, from the batch's members by name."""

    @abstractmethod
    def null(self, batch_size: int, device: torch.device | str) -> Conditioning:
        """The conditioning that says nothing: of dropped rows in training, and of guidance's second pass."""

    def drop(self, conditioning: Conditioning, mask_B: Tensor) -> Conditioning:
        """The rows where mask_B (B,) bool is True become null ones."""
        return conditioning.where(mask_B, self.null(len(mask_B), mask_B.device))

    def reset_parameters(self, seed: int) -> None:
        """Initial values of what the task learns; nothing by default."""
