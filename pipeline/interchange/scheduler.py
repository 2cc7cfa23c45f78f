"""The noise levels of a configuration in diffusers' words, for exported models."""

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
    """diffusers' scheduler_config.json for models of this process: its scheduler walks and steps as `sampler` does.

    Raises ConfigError where none of diffusers' does.
    """
    process = PROCESSES[config.prediction]
    made = SCHEDULERS[process].get(sampler)
    facts = made(config) if made is not None else {}
    if not facts:
        others = [name for name, make in SCHEDULERS[process].items() if make(config)]
        raise ConfigError(
            f"no scheduler of diffusers samples prediction={config.prediction} as sampler={sampler} does here; "
            f"those that are the same: {', '.join(others)}"
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
    zero = config.zero_terminal_snr
    return {
        "_class_name": "DDIMScheduler",
        **_betas(config),
        "rescale_betas_zero_snr": zero,
        "clip_sample": False,
        "set_alpha_to_one": zero,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero else "leading",
    }


def _dpmpp_2m(config: DiffusionConfig) -> dict[str, Any]:
    """{} from no signal: theirs takes alpha_bar there for 2^-24, ours is exact."""
    if config.zero_terminal_snr:
        return {}
    clipped = {"lambda_min_clipped": LOWEST_LOG_SNR} if config.prediction == "epsilon" else {}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **_betas(config),
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
    } | clipped


def _unipc(config: DiffusionConfig) -> dict[str, Any]:
    """{} as for DPM-Solver++, and where epsilon's walk begins later than theirs."""
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
    """Whether our walk of epsilon begins above LOWEST_LOG_SNR, where most of diffusers' cannot."""
    return config.prediction == "epsilon" and even_levels(config, 1)[0].timestep < config.timesteps - 1


def _euler(config: DiffusionConfig) -> dict[str, Any]:
    """{} where epsilon's walk begins later than theirs."""
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
    """{} from no signal, which theirs does not know, and where epsilon's walk begins later than theirs."""
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
        "prediction_type": "epsilon",  # their word for the sign of c_out
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
"""By process and sampler; {} where a configuration has none that is the same."""
