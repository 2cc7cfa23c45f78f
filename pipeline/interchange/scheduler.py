"""diffusers' scheduler configurations for exported models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config import DiffusionConfig
from pipeline.diffusion.levels import LOWEST_LOG_SNR, even_levels
from pipeline.diffusion.process import PROCESSES
from pipeline.errors import ConfigError

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
BETA_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


def scheduler_config(config: DiffusionConfig, sampler: str = "ddim") -> dict[str, Any]:
    """diffusers' scheduler_config.json for models of this process: the scheduler visits the levels of `sampler` and
    takes its steps.

    Raises ConfigError when diffusers has no such scheduler.
    """
    process = PROCESSES[config.prediction]
    build = SCHEDULERS[process].get(sampler)
    facts = build(config) if build is not None else {}
    if not facts:
        same_samplers = [name for name, builder in SCHEDULERS[process].items() if builder(config)]
        raise ConfigError(
            f"no scheduler of diffusers samples prediction={config.prediction} as sampler={sampler} does here; "
            f"those that are the same: {', '.join(same_samplers)}"
        )
    return facts


def pipeline_runs(config: DiffusionConfig) -> bool:
    """Whether diffusers' StableDiffusionPipeline can run those schedulers: it asks for init_noise_sigma, which the
    schedulers of rectified flow do not have."""
    return PROCESSES[config.prediction] != "flow"


def _betas(config: DiffusionConfig) -> dict[str, Any]:
    return {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": BETA_SCHEDULES[config.schedule],
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "prediction_type": PREDICTION_TYPES[config.prediction],
    }


def _ddim(config: DiffusionConfig) -> dict[str, Any]:
    zero_snr = config.zero_terminal_snr
    return {
        "_class_name": "DDIMScheduler",
        **_betas(config),
        "rescale_betas_zero_snr": zero_snr,
        "clip_sample": False,
        "set_alpha_to_one": zero_snr,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
    }


def _dpmpp_2m(config: DiffusionConfig) -> dict[str, Any]:
    """{} for zero terminal SNR, where diffusers takes alpha_bar as 2^-24 and ours is exactly 0."""
    if config.zero_terminal_snr:
        return {}
    clipping = {"lambda_min_clipped": LOWEST_LOG_SNR} if config.prediction == "epsilon" else {}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **_betas(config),
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
    } | clipping


def _unipc(config: DiffusionConfig) -> dict[str, Any]:
    """{} for zero terminal SNR, as for DPM-Solver++, and where epsilon's levels begin later than diffusers' do."""
    if config.zero_terminal_snr or _begins_later(config):
        return {}
    return {
        "_class_name": "UniPCMultistepScheduler",
        **_betas(config),
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
    }


def _begins_later(config: DiffusionConfig) -> bool:
    """Whether our levels for epsilon begin above LOWEST_LOG_SNR, which most of diffusers' schedulers cannot do."""
    return config.prediction == "epsilon" and even_levels(config, 1)[0].timestep < config.timesteps - 1


def _euler(config: DiffusionConfig) -> dict[str, Any]:
    """{} where epsilon's levels begin later than diffusers' do."""
    if _begins_later(config):
        return {}
    return {
        "_class_name": "EulerDiscreteScheduler",
        **_betas(config),
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "use_karras_sigmas": True,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
    }


def _heun(config: DiffusionConfig) -> dict[str, Any]:
    """{} for zero terminal SNR, which diffusers' class does not have, and where epsilon's levels begin later."""
    if config.zero_terminal_snr or _begins_later(config):
        return {}
    return {
        "_class_name": "HeunDiscreteScheduler",
        **_betas(config),
        "use_karras_sigmas": True,
        "timestep_spacing": "linspace",
    }


def _flow_match_euler(config: DiffusionConfig) -> dict[str, Any]:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": config.timesteps, "shift": 1.0}


def _flow_match_heun(config: DiffusionConfig) -> dict[str, Any]:
    return {"_class_name": "FlowMatchHeunDiscreteScheduler", "num_train_timesteps": config.timesteps, "shift": 1.0}


def _edm(config: DiffusionConfig) -> dict[str, Any]:
    return {
        "sigma_min": config.sigma_min,
        "sigma_max": config.sigma_max,
        "sigma_data": config.sigma_data,
        "sigma_schedule": "karras",
        "rho": config.rho,
        "prediction_type": "epsilon",  # diffusers' name for the sign of c_out
        "final_sigmas_type": "zero",
    }


def _edm_euler(config: DiffusionConfig) -> dict[str, Any]:
    return {"_class_name": "EDMEulerScheduler", **_edm(config)}


def _edm_dpmpp_2m(config: DiffusionConfig) -> dict[str, Any]:
    return {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        **_edm(config),
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
    }


SCHEDULERS: dict[str, dict[str, Callable[[DiffusionConfig], dict[str, Any]]]] = {
    "discrete": {"ddim": _ddim, "dpmpp_2m": _dpmpp_2m, "euler": _euler, "heun": _heun, "unipc": _unipc},
    "flow": {"ddim": _flow_match_euler, "euler": _flow_match_euler, "heun": _flow_match_heun},
    "edm": {"ddim": _edm_euler, "euler": _edm_euler, "dpmpp_2m": _edm_dpmpp_2m},
}
"""process -> sampler -> function that builds the configuration, or {} when diffusers has no equal scheduler."""
