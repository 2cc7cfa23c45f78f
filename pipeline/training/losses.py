"""The objective of the network that is trained: each sample's loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.diffusion.objective import Objective, Randomness
from pipeline.training.engines.base import Engine


class SampleLosses:
    """losses(latents, draws, conditions) -> (b,) the loss of each sample (Rombach et al. 2021, equation 2)."""

    def __init__(self, objective: Objective, engine: Engine) -> None:
        self.objective, self.engine = objective, engine

    def __call__(
        self, latents: Tensor, draws: Randomness, conditions: Mapping[str, Tensor], rows: slice = slice(None)
    ) -> Tensor:
        """latents (B, C, h, w), scaled. draws: of all B samples. conditions: (B, ...) what the task reads. rows: of
        the samples whose losses are wanted."""
        inputs = {name: tensor[rows] for name, tensor in conditions.items()}
        return self.objective.loss(
            lambda x, t: self.engine(x, t, inputs, draws.drop[rows]),
            latents[rows],
            draws.noise[rows],
            draws.timestep[rows],
        )
