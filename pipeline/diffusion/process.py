"""The forward processes: alpha and sigma at a time between latent and noise, and the network's timestep input there.

All are x_t = alpha x_0 + sigma noise. A time is an integer timestep of a schedule (schedule.py), t from 0 to 1 in
rectified flow, or sigma itself in Karras et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.diffusion.schedule import Schedule


class Process(Protocol):
    """A forward process, from latents to noise."""

    def at(self, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at times (B,), each (B, 1, 1, 1) float32."""
        ...

    def timestep_input(self, time_B: Tensor) -> Tensor:
        """The network's timestep input (B,) at times (B,)."""
        ...


class RectifiedFlow:
    """x_t = (1 - t) x_0 + t noise, t from 0 to 1 (Liu et al. 2022, equation 1; Esser et al. 2024, equation 13)."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def at(self, time_B: Tensor) -> tuple[Tensor, Tensor]:
        t = time_B.view(-1, 1, 1, 1)
        return 1 - t, t

    def timestep_input(self, time_B: Tensor) -> Tensor:
        """T t: float32 in [0, T], the range that timestep embeddings are designed for."""
        return self.timesteps * time_B


class Edm:
    """x = x_0 + sigma noise, where the time is sigma; the timestep input is c_noise = ln(sigma) / 4 (Karras et al.
    2022, table 1)."""

    def at(self, time_B: Tensor) -> tuple[Tensor, Tensor]:
        sigma = time_B.view(-1, 1, 1, 1)
        return torch.ones_like(sigma), sigma

    def timestep_input(self, time_B: Tensor) -> Tensor:
        return time_B.log() / 4


PROCESSES = {"epsilon": "discrete", "v": "discrete", "x0": "discrete", "flow": "flow", "edm": "edm"}
"""The process of each value of diffusion.prediction."""

NOISE_KEYS = {
    "discrete": ("schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr"),
    "flow": ("timesteps",),
    "edm": (),
}
"""Keys of the configuration that decide on a process's noise levels and their timestep inputs."""


def noise_facts(config: DiffusionConfig) -> dict[str, Any]:
    """What two networks must share to read the same noisy latents, by the configuration's keys."""
    process = PROCESSES[config.prediction]
    names = [name for name in NOISE_KEYS[process] if config.schedule != "cosine" or not name.startswith("beta_")]
    return {"process": process} | {name: getattr(config, name) for name in names}


MAKE: dict[str, Callable[[DiffusionConfig, torch.device | str], Process]] = {
    "discrete": Schedule,
    "flow": lambda config, device: RectifiedFlow(config.timesteps),
    "edm": lambda config, device: Edm(),
}


def make_process(config: DiffusionConfig, device: torch.device | str = "cpu") -> Process:
    """The process of a configuration, with its tables on one device."""
    return MAKE[PROCESSES[config.prediction]](config, device)
