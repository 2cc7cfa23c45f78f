"""Network and task in one module: what is trained, averaged and saved."""

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
        self.unet = UNet(config, in_channels=task.in_channels(config.in_channels))
        self.task = task

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        inputs: Mapping[str, Tensor] | Conditioning,
        drop_B: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction (B, C, H, W) for the noisy latent x.

        inputs: the batch's members in training, so that what the task learns gets its gradients here; or a Conditioning
        made once, as samplers do. drop_B (B,) bool: rows whose conditioning is replaced by the null one.
        """
        given = inputs if isinstance(inputs, Conditioning) else self.task.condition(inputs)
        if drop_B is not None:
            given = self.task.drop(given, drop_B)
        if given.concat is not None:
            x_BCHW = torch.cat([x_BCHW, given.concat.to(x_BCHW)], dim=1)
        return self.unet(x_BCHW, timestep_B, given.context, given.context_mask, given.vector, given.known)

    def reset_parameters(self, seed: int) -> None:
        """Initial weights of UNet and task, the same on every machine for one seed."""
        self.unet.reset_parameters(seed)
        self.task.reset_parameters(seed)
