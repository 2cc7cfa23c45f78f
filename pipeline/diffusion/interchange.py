"""The noise levels of a configuration in diffusers' words, for exported models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config import DiffusionConfig
from pipeline.diffusion.process import PROCESSES

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler_config(config: DiffusionConfig) -> dict[str, Any]:
    """diffusers' scheduler_config.json for models of this process: its scheduler, DDIM or Euler, walks and steps as
    sampler="ddim" does."""
    return SCHEDULERS[PROCESSES[config.prediction]](config)


def pipeline_runs(config: DiffusionConfig) -> bool:
    """Whether diffusers' StableDiffusionPipeline can run that scheduler: it asks for init_noise_sigma, which the
    scheduler of rectified flow does not have."""
    return PROCESSES[config.prediction] != "flow"


def _ddim(config: DiffusionConfig) -> dict[str, Any]:
    zero = config.zero_terminal_snr
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": BETA_SCHEDULES[config.schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "rescale_betas_zero_snr": zero,
        "prediction_type": PREDICTION_TYPES[config.prediction],
        "clip_sample": False,
        "set_alpha_to_one": zero,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero else "leading",
    }


def _flow_match_euler(config: DiffusionConfig) -> dict[str, Any]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": config.timesteps, "shift": 1.0}


def _edm_euler(config: DiffusionConfig) -> dict[str, Any]:
    return {
        "_class_name": "EDMEulerScheduler",
        "num_train_timesteps": config.timesteps,
        "sigma_min": config.sigma_min,
        "sigma_max": config.sigma_max,
        "sigma_data": config.sigma_data,
        "sigma_schedule": "karras",
        "rho": config.rho,
        "prediction_type": "epsilon",  # their word for the sign of c_out
        "final_sigmas_type": "zero",
    }


SCHEDULERS: dict[str, Callable[[DiffusionConfig], dict[str, Any]]] = {
    "discrete": _ddim,
    "flow": _flow_match_euler,
    "edm": _edm_euler,
}
