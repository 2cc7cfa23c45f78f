"""The objective of a classifier of noisy latents (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from pipeline.diffusion.objective import Randomness
from pipeline.training.objectives.diffusion import DiffusionObjective

CLASS = "cond.class"


class ClassifierObjective(DiffusionObjective):
    """Cross-entropy of the class, given what a denoiser would be given: the same latents, noise and times by sample
    number. The engine's module turns a noisy latent and its timestep into logits."""

    def sample_losses(
        self, latents: Tensor, draws: Randomness, conditions: Mapping[str, Tensor], rows: slice = slice(None)
    ) -> Tensor:
        """Each sample's cross-entropy (b,) in nats, float32."""
        x, timestep = self.diffusion.network_input(latents[rows], draws.noise[rows], draws.timestep[rows])
        logits = self.engine(x, timestep).float()
        return F.cross_entropy(logits, conditions[CLASS][rows].long(), reduction="none")
