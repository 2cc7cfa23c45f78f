"""The training objective: noise a latent, predict, compare (Rombach et al. 2021, equations 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import philox
from pipeline.config import DiffusionConfig
from pipeline.diffusion.schedule import Schedule
from pipeline.philox import Stream


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A sample of q(x_t | x_0) (Ho et al. 2020, equation 4)."""
    return alpha * x0 + sigma * noise


# What the network predicts: the target that it is trained on, and the x_0 that its prediction implies. Each takes
# tensors that broadcast together, or floats for alpha and sigma.


def _epsilon_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return noise


def _epsilon_to_x0(prediction: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    return (x - sigma * prediction) / alpha


def _v_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * noise - sigma * x0  # Salimans & Ho 2022, appendix D


def _v_to_x0(prediction: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    return alpha * x - sigma * prediction


TARGETS = {"epsilon": _epsilon_target, "v": _v_target}
TO_X0 = {"epsilon": _epsilon_to_x0, "v": _v_to_x0}
LOSSES = {"l2": torch.square, "l1": torch.abs}


def to_eps(x0: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The noise that takes x_0 to x."""
    return (x - alpha * x0) / sigma


class Objective:
    """The loss of a configuration, with its tables on one device."""

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.schedule = Schedule(config, device)
        self.target, self.distance = TARGETS[config.prediction], LOSSES[config.loss]

    def loss(
        self, denoise: Callable[[Tensor, Tensor], Tensor], x0_BCHW: Tensor, noise_BCHW: Tensor, timestep_B: Tensor
    ) -> Tensor:
        """Each sample's loss (B,) float32: E || target - denoise(x_t, t) ||, mean over the latent's elements."""
        alpha, sigma = self.schedule.at(timestep_B)
        x_t = add_noise(x0_BCHW, noise_BCHW, alpha, sigma)
        target = self.target(x0_BCHW, noise_BCHW, alpha, sigma)
        return self.distance(denoise(x_t, timestep_B).float() - target).mean(dim=(1, 2, 3))


# --------------------------------------------------------------------------------------------------------------------
# What is random in a training step, as pure functions of (seed, sample number)


@dataclass(frozen=True)
class Randomness:
    """Everything random that samples n (B,) get in training."""

    posterior: Tensor  # (B, C, h, w) float32 normals: which sample of the autoencoder's posterior
    noise: Tensor  # (B, C, h, w) float32 normals: what is added
    timestep: Tensor  # (B,) int64 in [0, T)
    drop: Tensor  # (B,) bool: conditioning replaced by the null one


def training_randomness(
    seed: int, numbers_B: Tensor, latent_shape: tuple[int, int, int], config: DiffusionConfig, drop: float
) -> Randomness:
    """What belongs to the samples numbered `numbers_B` (int64), on that tensor's device; drop: probability."""
    return Randomness(
        posterior=philox.normal(seed, Stream.POSTERIOR, numbers_B, latent_shape),
        noise=philox.normal(seed, Stream.NOISE, numbers_B, latent_shape),
        timestep=TIMESTEPS[config.timestep_sampling](seed, numbers_B, config.timesteps),
        drop=philox.uniform(seed, Stream.DROPOUT, numbers_B)[:, 0] < drop,
    )


def uniform_timesteps(seed: int, numbers_B: Tensor, timesteps: int) -> Tensor:
    """Independent and uniform: (B,) int64 in [0, timesteps), in integer arithmetic."""
    return (philox.words(seed, Stream.TIMESTEP, numbers_B, 1)[:, 0] * timesteps) >> 32


def stratified_timesteps(seed: int, numbers_B: Tensor, timesteps: int) -> Tensor:
    """Uniform over a run and almost evenly spread over any stretch of it, so that batch losses vary less."""
    fraction, _ = philox.stratified_uniform(seed, numbers_B)
    return (((fraction >> 32) & philox.MASK) * timesteps) >> 32


TIMESTEPS = {"uniform": uniform_timesteps, "stratified": stratified_timesteps}
