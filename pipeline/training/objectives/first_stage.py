"""The objective of an autoencoder (Rombach et al. 2021, section 3.1 and appendix G; Esser et al. 2021).

    L = l1 |x - y| + l2 |x - y|^2 + perceptual P(x, y) + regularizer + weight ratio g(D(y)) + hinge(D(x), D(y))

Every term is per pixel value: L1 and L2 are means over a picture, and the divergence of its posterior, in nats, is
divided by the 3 H W values of the picture. One backward pass gives the autoencoder the gradient of all but the last
term, and the discriminator that of the last alone (models/first_stage/trainable.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import AutoencoderConfig
from pipeline.data.reading.batch import Batch
from pipeline.data.reading.device import to_device
from pipeline.models.first_stage.discriminator import fooled, hinge
from pipeline.models.first_stage.trainable import Outputs, TrainableAutoencoder
from pipeline.models.perceptual.network import Perceptual
from pipeline.planning.first_stage import step_flops
from pipeline.training.engines.base import Engine
from pipeline.training.objectives.adversary import adversarial_gradient, phase_at
from pipeline.training.objectives.base import Objective, Prepared, StepLoss
from pipeline.training.objectives.codes import Codes, stretches
from pipeline.training.objectives.pixels import PIXELS, corners, cut, flips

CODEBOOK = "model.quantize.embedding.weight"
"""Name of the codebook (n, C) among the module's parameters."""


@dataclass
class PreparedPictures(Prepared):
    """images: (b, 3, H, W) in [-1, 1], cut and flipped. noise: (b, C, h, w) of the posterior; None with a codebook."""

    what: ClassVar[str] = "picture"
    noise: Tensor | None = None
    more: dict[str, Tensor] = field(default_factory=dict)
    """Other arrays of the samples (b, ...), which further losses read."""


class FirstStageObjective(Objective):
    """engine: of a TrainableAutoencoder. perceptual: None for no such term."""

    def __init__(self, config: AutoencoderConfig, *, engine: Engine, perceptual: Perceptual | None = None) -> None:
        assert isinstance(engine.module, TrainableAutoencoder)
        self.config, self.engine, self.perceptual = config, engine, perceptual
        self.module, self.world = engine.module, engine.world
        self.codes: Codes | None = None
        if config.autoencoder.regularizer == "vq":
            self.codes = Codes(
                config.autoencoder.codes,
                config.loss.restart,
                seed=config.seed,
                batch=config.optim.batch,
                world=self.world,
            )
        self._numbers = torch.zeros(0, dtype=torch.int64)

    def prepare(self, batch: Batch) -> PreparedPictures:
        config, device, numbers = self.config, self.world.device, batch.numbers
        self._numbers = numbers
        if self.codes is not None:
            self.codes.begin()
        pixels, digest = batch.tensors[PIXELS].to(device, non_blocking=True), list[Tensor]()
        if config.crop:
            height, width = pixels.shape[2:]
            places = corners(config.seed, numbers, (height, width), config.crop)
            pixels = cut(pixels, places, config.crop)
            digest.append(to_device(places, device))
        images = pixels.float().div(127.5).sub(1)
        if config.flip:
            flipped = to_device(flips(config.seed, numbers), device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
            digest.append(flipped)
        noise = None
        if config.autoencoder.regularizer == "kl":
            factor, (height, width) = config.autoencoder.downsampling, images.shape[2:]
            shape = (config.autoencoder.latent_channels, height // factor, width // factor)
            noise = philox.normal(config.seed, philox.Stream.POSTERIOR, to_device(numbers, device), shape)
            digest.append(noise)
        more = {name: tensor.to(device) for name, tensor in batch.tensors.items() if name != PIXELS}
        return PreparedPictures(batch, images, digest, noise=noise, more=more)

    def losses(self, prepared: Prepared, rows: slice) -> StepLoss:
        """loss_B: of everything but the discriminator's terms, NaN where these are not finite. Collective where the
        autoencoder feels it."""
        assert isinstance(prepared, PreparedPictures), "what this objective has prepared"
        x, noise = prepared.images[rows], None if prepared.noise is None else prepared.noise[rows]
        phase = phase_at(self.config.gan, prepared.batch.n)
        outputs = self.engine(x, noise, phase.weight > 0, phase.trains)
        likelihood_B, figures = self._likelihood(x, outputs.reconstruction)
        regularizer_B = self._regularizer(x, outputs, figures)
        loss_B = (likelihood_B + regularizer_B).detach()
        total = likelihood_B.mean()
        if outputs.logits_for_generator is not None:
            generator_B = fooled(outputs.logits_for_generator)
            generator = generator_B.mean()
            loss_B = known(loss_B, generator_B)
            gradient, figures["lambda"] = adversarial_gradient(
                outputs.reconstruction,
                self.module.last_layer,
                likelihood=total,
                generator=generator,
                weight=phase.weight,
                world=self.world,
            )
            figures["gan"] = generator
            total = (outputs.reconstruction * gradient).sum()  # has that gradient
        total = total + regularizer_B.mean()
        if outputs.logits_real is not None and outputs.logits_fake is not None:
            hinge_B = hinge(outputs.logits_real, outputs.logits_fake)
            figures["discriminator"], loss_B = hinge_B.mean(), known(loss_B, hinge_B)
            figures["logits_real"], figures["logits_fake"] = outputs.logits_real.mean(), outputs.logits_fake.mean()
            total = total + figures["discriminator"]
        if self.module.extra is not None:
            further = self.module.extra(outputs, x, {name: tensor[rows] for name, tensor in prepared.more.items()})
            figures |= further
            total = total + sum(further.values())
        return StepLoss(loss_B, total, {name: value.detach() for name, value in figures.items()})

    def _likelihood(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How far reconstructions y are from pictures x (b, 3, H, W): (b,), and its parts as figures."""
        loss, error = self.config.loss, y - x
        total_B = error.new_zeros(len(x))
        if loss.l1:
            total_B = total_B + loss.l1 * error.abs().mean(dim=(1, 2, 3))
        if loss.l2:
            total_B = total_B + loss.l2 * error.square().mean(dim=(1, 2, 3))
        figures = {"rec": total_B.mean()}
        if self.perceptual is not None:
            distance_B = self.perceptual.distance(x, y)
            figures["perceptual"] = distance_B.mean()
            total_B = total_B + loss.perceptual_weight * distance_B
        return total_B, figures

    def _regularizer(self, x: Tensor, outputs: Outputs, figures: dict[str, Tensor]) -> Tensor:
        """The weighted terms of latents (b,). Adds to the figures what they are without weights."""
        loss = self.config.loss
        if outputs.kl_B is not None:
            kl_B = outputs.kl_B / x[0].numel()
            figures["kl"] = kl_B.mean()
            return loss.kl * kl_B
        assert outputs.quantised is not None and self.codes is not None
        self.codes.see(outputs.quantised)
        figures["quantisation"] = outputs.quantised.commitment_loss_B.mean()
        return loss.codebook * outputs.quantised.codebook_loss_B + loss.commitment * outputs.quantised.commitment_loss_B

    def after_step(self, n: int) -> Mapping[str, Tensor]:
        """Restarts codes that are dead, with moments of 0. Averages follow the new values as they follow any other."""
        if self.codes is None:
            return {}
        dead, values = self.codes.stepped(n, self._numbers)
        for first, last in stretches(dead):
            self.engine.overwrite(CODEBOOK, int(dead[first]) * values.shape[1], values[first:last].flatten())
        if len(dead):
            self.engine.refresh()
        return {}

    def row(self, n: int) -> dict[str, float]:
        return self.codes.row() if self.codes is not None else {}

    def warning(self, n: int) -> str:
        return self.codes.warning(n >= self.config.optim.warmup) if self.codes is not None else ""

    def flops(self, prepared: Prepared) -> float:
        """FLOPs of a training step of one picture, by the plan's arithmetic, without further losses."""
        phase, (height, width) = phase_at(self.config.gan, prepared.batch.n), prepared.images.shape[2:]
        return float(
            step_flops(
                *(self.config.autoencoder, self.config.gan, height, width),
                perceptual=None if self.perceptual is None else self.perceptual.kind,
                generator=phase.weight > 0,
                discriminator=phase.trains,
            )
        )

    def state(self) -> dict[str, Any]:
        return self.codes.state() if self.codes is not None else {}

    def load(self, state: Mapping[str, Any]) -> None:
        if self.codes is not None:
            self.codes.load(state)


def known(loss_B: Tensor, other_B: Tensor) -> Tensor:
    """The losses (b,), NaN where another loss of the same samples is not finite."""
    return torch.where(other_B.detach().isfinite(), loss_B, torch.nan)
