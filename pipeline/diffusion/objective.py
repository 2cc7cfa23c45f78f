"""The training objective: add noise to a latent, predict, compare (Rombach et al. 2021, equations 2 and 3).

docs/reference/objectives.md lists the choices, with formulas and sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.prediction import add_noise, make_prediction, min_snr_weight
from pipeline.diffusion.process import make_process
from pipeline.diffusion.timesteps import draw_times
from pipeline.philox import Stream

LOSSES = {"l2": torch.square, "l1": torch.abs}


class Objective:
    """The loss of a diffusion configuration, with its tables on one device."""

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.process, self.prediction = make_process(config, device), make_prediction(config)
        self.distance = LOSSES[config.loss]

    def network_input(self, x0_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """What a network is given at times of draw_times: the noisy latent (B, C, h, w), scaled for it, and its
        timestep input (B,)."""
        alpha, sigma = self.process.at(time_B)
        x_t = add_noise(x0_BCHW, noise_BCHW, alpha, sigma)
        return self.prediction.scale(x_t, sigma), self.process.timestep_input(time_B)

    def loss(
        self, denoise: Callable[[Tensor, Tensor], Tensor], x0_BCHW: Tensor, noise_BCHW: Tensor, time_B: Tensor
    ) -> Tensor:
        """Each sample's loss (B,) float32: its weight times || target - denoise(x_t, t) ||, averaged over the latent's
        elements.

        denoise(x, timestep_B): the network's output. x0, noise: (B, C, h, w) float32. time_B: times of draw_times.
        """
        alpha, sigma = self.process.at(time_B)
        target = self.prediction.target(x0_BCHW, noise_BCHW, alpha, sigma)
        output = denoise(*self.network_input(x0_BCHW, noise_BCHW, time_B)).float()
        loss = self.distance(output - target).mean(dim=(1, 2, 3))
        if gamma := self.config.min_snr_gamma:
            loss = loss * min_snr_weight(self.config.prediction, gamma, alpha, sigma).view(-1)
        return loss


# --------------------------------------------------------------------------------------------------------------------
# Random draws of a training step, as pure functions of (seed, sample number)


@dataclass(frozen=True)
class Randomness:
    """All random draws of a training step for B samples."""

    posterior: Tensor  # (B, C, h, w) float32 normals: the sample of the autoencoder's posterior
    noise: Tensor  # (B, C, h, w) float32 normals: the noise that is added, offset noise included
    timestep: Tensor  # (B,) int64 in [0, T); float32 for flow (t) and edm (sigma)
    drop: Tensor  # (B,) bool: samples whose conditioning is replaced by the null one


def training_randomness(
    seed: int, numbers_B: Tensor, latent_shape: tuple[int, int, int], config: DiffusionConfig, drop: float
) -> Randomness:
    """The draws of the samples numbered `numbers_B` (int64), on that tensor's device. drop: probability of a drop."""
    return Randomness(
        posterior=philox.normal(seed, Stream.POSTERIOR, numbers_B, latent_shape),
        noise=training_noise(seed, numbers_B, latent_shape, config.offset_noise),
        timestep=draw_times(seed, numbers_B, config),
        drop=philox.uniform(seed, Stream.DROPOUT, numbers_B)[:, 0] < drop,
    )


def training_noise(seed: int, numbers_B: Tensor, latent_shape: tuple[int, int, int], offset: float) -> Tensor:
    """Standard normals (B, C, h, w) float32, plus `offset` times one normal per sample and channel (Guttenberg 2023,
    "Diffusion with offset noise"): variance 1 + offset^2 of an element, covariance offset^2 of two in one channel."""
    noise = philox.normal(seed, Stream.NOISE, numbers_B, latent_shape)
    if offset:
        noise += offset * philox.normal(seed, Stream.OFFSET, numbers_B, (latent_shape[0], 1, 1))
    return noise
