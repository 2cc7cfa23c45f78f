"""Small autoencoders with every kind of layer, and a step of theirs, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import FirstStageConfig, GanConfig
from pipeline.models.first_stage.discriminator import fooled, hinge
from pipeline.models.first_stage.trainable import Outputs, TrainableAutoencoder

KL = FirstStageConfig(
    name="kl", channels=8, multipliers=(1, 2), blocks=1, latent_channels=3, attention=(2,), norm_groups=4
)
VQ = FirstStageConfig(
    name="vq",
    regularizer="vq",
    channels=8,
    multipliers=(1, 2, 2),
    blocks=2,
    latent_channels=3,
    norm_groups=4,
    codes=20,
)
GAN = GanConfig(weight=0.5, channels=8, layers=2)


def made(config: FirstStageConfig, gan: GanConfig | None = GAN, seed: int = 0) -> TrainableAutoencoder:
    """An autoencoder with seeded weights. Its codes are apart as those of a trained one are."""
    module = TrainableAutoencoder(config, gan)
    module.reset_parameters(seed)
    if config.regularizer == "vq":
        with torch.no_grad():
            module.codebook.mul_(config.codes)
    return module


def pictures(batch: int = 3, side: int = 16, seed: int = 1) -> Tensor:
    """Noise (batch, 3, side, side) in [-1, 1]."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(config: FirstStageConfig, batch: int = 3, side: int = 16) -> Tensor | None:
    """What the posterior is drawn with; None for codes."""
    if config.regularizer == "vq":
        return None
    f = config.downsampling
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, config.latent_channels, side // f, side // f, generator=generator)


def autoencoder_loss(outputs: Outputs, x: Tensor) -> Tensor:
    """The loss of the paper's autoencoders with some weights."""
    loss = (outputs.reconstruction - x).abs().mean()
    if outputs.kl_B is not None:
        loss = loss + 1e-3 * outputs.kl_B.mean()
    if outputs.quantised is not None:
        loss = loss + (outputs.quantised.codebook_loss_B + 0.25 * outputs.quantised.commitment_loss_B).mean()
    if outputs.logits_for_generator is not None:
        loss = loss + 0.3 * fooled(outputs.logits_for_generator).mean()
    return loss


def discriminator_loss(outputs: Outputs) -> Tensor:
    """The hinge loss."""
    assert outputs.logits_real is not None
    assert outputs.logits_fake is not None
    return hinge(outputs.logits_real, outputs.logits_fake).mean()
