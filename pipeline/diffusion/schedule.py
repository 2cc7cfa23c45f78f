"""The discrete process: how much signal and noise a latent has at each timestep of a schedule of betas.

x_t = alpha_t x_0 + sigma_t noise,   alpha_t = sqrt(alpha_bar_t),   sigma_t = sqrt(1 - alpha_bar_t)
alpha_bar_t = product of (1 - beta_s) for s <= t                            (Ho et al. 2020, equation 4)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig

LARGEST_BETA = 0.999  # of the cosine schedule, which has a singularity at its end (Nichol & Dhariwal 2021, section 3.2)


def linear(start: float, end: float, timesteps: int) -> Tensor:
    """Betas that rise linearly (Ho et al. 2020): (T,) float64."""
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def scaled_linear(start: float, end: float, timesteps: int) -> Tensor:
    """Betas whose square roots rise linearly (Rombach et al. 2021, released models): (T,) float64."""
    return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2


def cosine(start: float, end: float, timesteps: int) -> Tensor:
    """Betas of alpha_bar = f(t) / f(0), f(t) = cos(((t / T + s) / (1 + s)) pi / 2)^2 with s = 0.008 (Nichol & Dhariwal
    2021, equation 17): (T,) float64. start and end are not used."""
    time = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=LARGEST_BETA)


SCHEDULES = {"scaled_linear": scaled_linear, "linear": linear, "cosine": cosine}


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """alpha_bar with its square root shifted and scaled so that the first value stays and the last is 0 (Lin et al.
    2023, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


class Schedule:
    """Tables over the timesteps 0 to T - 1 of a variance-preserving process; float64, on one device."""

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        betas = SCHEDULES[config.schedule](config.beta_start, config.beta_end, config.timesteps)
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        if config.zero_terminal_snr:
            alpha_bar = zero_terminal_snr(alpha_bar)
        self.timesteps = config.timesteps
        self.alpha_bar = alpha_bar.to(device)  # (T,), falling from almost 1 to almost 0, or to 0

    def at(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each (B, 1, 1, 1) float32, at integer timesteps (B,)."""
        alpha_bar = self.alpha_bar[timestep_B].view(-1, 1, 1, 1)
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def timestep_input(self, timestep_B: Tensor) -> Tensor:
        """The timestep itself."""
        return timestep_B
