"""The noise levels that samplers visit, from noise to a latent, for each process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.config import DiffusionConfig
from pipeline.diffusion.process import PROCESSES
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError

LOWEST_LOG_SNR = -5.1
"""Lowest log SNR at which a second-order sampler may begin if the network predicts epsilon: an error of epsilon enters
x_0 multiplied by sigma / alpha. This is the usual bound for cosine schedules (lambda_min_clipped in diffusers);
schedules like Stable Diffusion's end above it."""

KARRAS_RHO = 7.0
"""rho of equation 5 in the discrete process; edm has its own (diffusion.rho)."""


@dataclass(frozen=True)
class Level:
    """One noise level: x = alpha x_0 + sigma noise, and the network's timestep input there.

    timestep: an int where it is a timestep of the discrete process, else a float; -1 at the last level, where the
    network is not evaluated. In the discrete process only sigma / alpha matters: alpha^2 + sigma^2 is 1, or alpha is 1
    as in Karras et al.
    """

    timestep: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma) (Lu et al. 2022); infinity without noise, minus infinity without signal."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


END = Level(-1, 1.0, 0.0)


# --------------------------------------------------------------------------------------------------------------------
# Levels of the discrete process


def ddim_levels(config: DiffusionConfig, steps: int) -> list[Level]:
    """Trailing levels if the last timestep is pure noise, else leading levels, as in Stable Diffusion's DDIM."""
    return (trailing_levels if config.zero_terminal_snr else leading_levels)(config, steps)


def leading_levels(config: DiffusionConfig, steps: int) -> list[Level]:
    """Timesteps 1, 1 + T/steps, 1 + 2T/steps, ... in reverse, then timestep 0. Raises ConfigError."""
    stride = config.timesteps // steps
    timesteps = [1 + i * stride for i in reversed(range(steps))] + [0]
    if stride == 0 or not 0.75 * config.timesteps <= timesteps[0] < config.timesteps:
        raise ConfigError(
            f"ddim with {steps} steps would start at timestep {timesteps[0]} of {config.timesteps}, not at noise: "
            f"choose a number of steps that divides {config.timesteps}, at most {config.timesteps // 2}"
        )
    schedule = Schedule(config)
    return [_level(schedule, t) for t in timesteps]


def trailing_levels(config: DiffusionConfig, steps: int) -> list[Level]:
    """Timesteps T - 1, T - 1 - T/steps, ..., rounded, then no noise (Lin et al. 2023, section 3.3 and table 2). Raises
    ConfigError."""
    if steps > config.timesteps:
        raise ConfigError(f"ddim takes at most as many steps as there are timesteps ({config.timesteps}), not {steps}")
    schedule = Schedule(config)
    timesteps = np.arange(config.timesteps, 0, -config.timesteps / steps).round().astype(int)[:steps] - 1
    return [*(_level(schedule, int(t)) for t in timesteps), END]


def even_levels(config: DiffusionConfig, steps: int) -> list[Level]:
    """Timesteps from T - 1 down in `steps` equal strides, rounded, then no noise ("linspace" in diffusers). For epsilon
    they begin at the last timestep above LOWEST_LOG_SNR. Raises ConfigError."""
    schedule = Schedule(config)
    alpha_bar = schedule.alpha_bar.numpy()
    with np.errstate(divide="ignore"):
        first_timestep = _first_timestep(config, np.log(alpha_bar / (1 - alpha_bar)) / 2)
    if steps > first_timestep:
        raise ConfigError(
            f"dpmpp_2m and unipc take fewer steps than there are timesteps ({first_timestep + 1}), not {steps}"
        )
    timesteps = np.linspace(0, first_timestep, steps + 1).round().astype(int)[:0:-1]
    return [*(_level(schedule, int(t)) for t in timesteps), END]


def _first_timestep(config: DiffusionConfig, log_snr_T: np.ndarray) -> int:
    """The timestep at which samplers begin, given the falling log SNRs (T,): the last one, or for epsilon the last one
    above LOWEST_LOG_SNR."""
    if config.prediction != "epsilon":
        return len(log_snr_T) - 1
    return max(int(np.count_nonzero(log_snr_T >= LOWEST_LOG_SNR)) - 1, 0)


def karras_timesteps(config: DiffusionConfig, steps: int) -> list[Level]:
    """sigma / alpha from that of the schedule's last timestep to that of its first, in equal strides of its seventh
    root, then 0 (Karras et al. 2022, equation 5).

    The timestep input is interpolated between the schedule's timesteps, linearly in log(sigma / alpha). If the last
    timestep is pure noise, its alpha_bar is taken as 2^-24, as in diffusers. For epsilon the first level is the last
    timestep above LOWEST_LOG_SNR.
    """
    alpha_bar = Schedule(config).alpha_bar.numpy().copy()
    if config.zero_terminal_snr:
        alpha_bar[-1] = 2.0**-24
    schedule_sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
    schedule_sigmas = schedule_sigmas[: _first_timestep(config, -np.log(schedule_sigmas)) + 1]
    sigmas = (
        np.linspace(schedule_sigmas[-1] ** (1 / KARRAS_RHO), schedule_sigmas[0] ** (1 / KARRAS_RHO), steps)
        ** KARRAS_RHO
    )
    timesteps = np.interp(np.log(sigmas), np.log(schedule_sigmas), np.arange(len(schedule_sigmas)))
    return [*(Level(t, 1.0, sigma) for t, sigma in zip(timesteps.tolist(), sigmas.tolist(), strict=True)), END]


def _level(schedule: Schedule, timestep: int) -> Level:
    alpha_bar = float(schedule.alpha_bar[timestep])
    return Level(timestep, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


# --------------------------------------------------------------------------------------------------------------------
# Levels of rectified flow


def flow_levels(config: DiffusionConfig, steps: int) -> list[Level]:
    """t from 1 to 1/T in equal strides, then 0, as in diffusers' FlowMatchEulerDiscreteScheduler."""
    return _flow_levels(np.linspace(1.0, 1 / config.timesteps, steps), config)


def even_flow_levels(config: DiffusionConfig, steps: int) -> list[Level]:
    """t from 1 to 0 in equal strides."""
    return _flow_levels(1 - np.arange(steps) / steps, config)


def _flow_levels(times: np.ndarray, config: DiffusionConfig) -> list[Level]:
    return [*(Level(config.timesteps * t, 1 - t, t) for t in times.tolist()), END]


# --------------------------------------------------------------------------------------------------------------------
# Levels of EDM


def karras_levels(config: DiffusionConfig, steps: int) -> list[Level]:
    """sigma from sigma_max to sigma_min in equal strides of sigma^(1/rho), then 0 (Karras et al. 2022, equation 5)."""
    first, last = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    sigmas = np.linspace(first, last, steps) ** config.rho
    return [*(Level(math.log(sigma) / 4, 1.0, sigma) for sigma in sigmas.tolist()), END]


LEVELS: dict[str, dict[str, Callable[[DiffusionConfig, int], list[Level]]]] = {
    "discrete": {
        "ddim": ddim_levels,
        "dpmpp_2m": even_levels,
        "euler": karras_timesteps,
        "heun": karras_timesteps,
        "unipc": even_levels,
    },
    "flow": {
        "ddim": flow_levels,
        "dpmpp_2m": even_flow_levels,
        "euler": flow_levels,
        "heun": flow_levels,
        "unipc": even_flow_levels,
    },
    "edm": dict.fromkeys(("ddim", "dpmpp_2m", "euler", "heun", "unipc"), karras_levels),
}
"""The function that makes the levels, by process and sampler."""


def levels_for(config: DiffusionConfig, sampler: str, steps: int) -> list[Level]:
    """The steps + 1 levels of `steps` steps. Raises ConfigError for a number of steps that the sampler cannot take."""
    if steps < 1:
        raise ConfigError(f"steps={steps}: at least one denoising step")
    return LEVELS[PROCESSES[config.prediction]][sampler](config, steps)


def first_spread(config: DiffusionConfig, level: Level) -> float:
    """Standard deviation of x at the first level: that of latents of variance 1 plus their noise, or of the noise alone
    in the discrete process if alpha is 1 (Karras et al. 2022, algorithm 1)."""
    if PROCESSES[config.prediction] == "discrete" and level.alpha == 1.0:
        return level.sigma
    return math.hypot(level.alpha, level.sigma)
