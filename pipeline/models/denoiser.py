"""UNet and task in one module: the module that is trained, averaged and saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.models.tasks.task import Task
from pipeline.models.unet.model import UNet


class Denoiser(nn.Module):
    """UNet and task: the one module that is trained, averaged and saved (`unet.*` and `task.*` in its state dict)."""

    def __init__(self, config: ModelConfig, task: Task) -> None:
        super().__init__()
        self.unet = UNet(config, in_channels=config.in_channels + task.extra_channels)
        self.task = task

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        inputs: Mapping[str, Tensor] | Conditioning,
        drop_B: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction (B, C, H, W) for the noisy latent x.

        inputs: in training the batch's members, so that gradients reach the task's parameters; in sampling a
        Conditioning that was made once. drop_B (B,) bool: rows whose conditioning is replaced by the null one.
        """
        assert drop_B is None or not isinstance(inputs, Conditioning), "a conditioning has no rows to drop"
        conditioning = inputs if isinstance(inputs, Conditioning) else self.task(inputs, drop_B)
        if conditioning.concat is not None:
            x_BCHW = torch.cat([x_BCHW, conditioning.concat.to(x_BCHW)], dim=1)
        return self.unet(
            x_BCHW,
            timestep_B,
            conditioning.context,
            conditioning.context_mask,
            conditioning.vector,
            conditioning.context_cache,
        )

    def reset_parameters(self, seed: int) -> None:
        """Initialize UNet and task; one seed gives the same weights on every machine."""
        self.unet.reset_parameters(seed)
        self.task.reset_parameters(seed)
