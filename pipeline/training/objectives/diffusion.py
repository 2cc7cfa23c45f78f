"""The objective of a diffusion model (Rombach et al. 2021, equation 2), on what a cache holds of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.device import to_device
from pipeline.diffusion.objective import Objective as Diffusion
from pipeline.diffusion.objective import Randomness, training_randomness
from pipeline.diffusion.timesteps import noise_bucket
from pipeline.planning.flops import Flops
from pipeline.training.engines.base import Engine
from pipeline.training.inputs import Inputs
from pipeline.training.objectives.base import Objective, Prepared, StepLoss


@dataclass
class PreparedLatents(Prepared):
    """latents: (b, C, h, w), scaled, which `images` is too. conditions: (b, ...) what the task reads."""

    draws: Randomness = field(kw_only=True)
    conditions: dict[str, Tensor] = field(kw_only=True)
    tokens: int = 0
    """Tokens of a caption, 0 without captions."""


class DiffusionObjective(Objective):
    """drop: probability that a sample's conditioning is replaced by the null one. flops: None where they are not
    counted."""

    def __init__(
        self,
        config: DiffusionConfig,
        drop: float,
        *,
        engine: Engine,
        inputs: Inputs,
        flops: Flops | None = None,
    ) -> None:
        self.config, self.drop = config, drop
        self.engine, self.inputs, self._flops = engine, inputs, flops
        self.diffusion = Diffusion(config, engine.world.device)

    def prepare(self, batch: Batch) -> PreparedLatents:
        device = self.engine.world.device
        images, conditions = self.inputs.on_device(batch, device)
        numbers, shape = to_device(batch.numbers, device), self.inputs.latents.shape(images)
        draws = training_randomness(self.inputs.seed, numbers, shape, self.config, self.drop)
        text = batch.tensors.get("text", batch.tensors.get("tokens"))
        chosen = [] if batch.chosen is None else [to_device(batch.chosen, device)]
        return PreparedLatents(
            batch,
            self.inputs.latents.draw(images, draws.posterior),
            [draws.posterior, draws.noise, draws.timestep, draws.drop, *chosen],
            noise_bucket(draws.timestep, self.config),
            draws=draws,
            conditions=conditions,
            tokens=text.shape[1] if text is not None else 0,
        )

    def losses(self, prepared: Prepared, rows: slice) -> StepLoss:
        assert isinstance(prepared, PreparedLatents), "what this objective has prepared"
        loss_B = self.sample_losses(prepared.images, prepared.draws, prepared.conditions, rows)
        return StepLoss(loss_B, loss_B.mean())

    def sample_losses(
        self, latents: Tensor, draws: Randomness, conditions: Mapping[str, Tensor], rows: slice = slice(None)
    ) -> Tensor:
        """Each sample's loss (b,). latents (B, C, h, w), scaled. draws: of all B samples. conditions: (B, ...) what the
        task reads. rows: of the samples whose losses are wanted."""
        inputs = {name: tensor[rows] for name, tensor in conditions.items()}
        return self.diffusion.loss(
            lambda x, t: self.engine(x, t, inputs, draws.drop[rows]),
            latents[rows],
            draws.noise[rows],
            draws.timestep[rows],
        )

    def flops(self, prepared: Prepared) -> float:
        """FLOPs of a training step of one image."""
        assert isinstance(prepared, PreparedLatents), "what this objective has prepared"
        if self._flops is None:
            return 0.0
        channels, height, width = prepared.images.shape[1:]
        return self._flops((channels, height, width), prepared.tokens)
