"""The forward process: how much signal and noise a latent holds at each timestep.

x_t = alpha_t x_0 + sigma_t noise,   alpha_t = sqrt(alpha_bar_t),   sigma_t = sqrt(1 - alpha_bar_t)
alpha_bar_t = product of (1 - beta_s) for s <= t                            (Ho et al. 2020, equation 4)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig


def linear(start: float, end: float, timesteps: int) -> Tensor:
    """Betas that rise linearly (Ho et al. 2020)."""
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def scaled_linear(start: float, end: float, timesteps: int) -> Tensor:
    """Betas whose square roots rise linearly (Rombach et al. 2021, released models)."""
    return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2


SCHEDULES = {"scaled_linear": scaled_linear, "linear": linear}


class Schedule:
    """Tables over the timesteps 0 to T - 1 of a variance-preserving process; float64, on one device."""

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        betas = SCHEDULES[config.schedule](config.beta_start, config.beta_end, config.timesteps)
        self.timesteps = config.timesteps
        self.alpha_bar = torch.cumprod(1 - betas, dim=0).to(device)  # (T,), falling from almost 1 to almost 0

    def at(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each (B, 1, 1, 1) float32, at integer timesteps (B,)."""
        alpha_bar = self.alpha_bar[timestep_B].view(-1, 1, 1, 1)
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}  # ours: diffusers' word


def scheduler_config(config: DiffusionConfig) -> dict[str, Any]:
    """diffusers' scheduler_config.json for models of this process: its DDIMScheduler equals sampler="ddim"."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": config.schedule,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": PREDICTION_TYPES[config.prediction],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
