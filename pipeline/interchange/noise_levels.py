"""The noise levels that a network was trained at, as far as its files state them, beside those of a run.

scheduler_config.json     of a diffusers folder: betas, their schedule, zero terminal SNR
alphas_cumprod, betas     tables in CompVis' files
v_pred, ztsnr             empty tensors by which ComfyUI's users mark a file
latentmill                the facts in our own files
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from pipeline.config import DiffusionConfig
from pipeline.config.values.bounds import Between, Gt
from pipeline.diffusion.process import PROCESSES
from pipeline.diffusion.schedule import Schedule, zero_terminal_snr
from pipeline.errors import ParseError, WeightsError
from pipeline.interchange.scheduler import BETA_SCHEDULES, PREDICTION_TYPES
from pipeline.parsing.typed import build

SETTINGS = {
    "discrete": ("schedule", "timesteps", "beta_start", "beta_end", "zero_terminal_snr"),
    "flow": ("timesteps",),
    "edm": ("sigma_data",),
}
"""Process -> the keys of `diffusion` that set the levels a network is trained at."""
V_PRED, ZTSNR = "v_pred", "ztsnr"
OURS = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
SCHEDULES = {theirs: ours for ours, theirs in BETA_SCHEDULES.items()}
LARGEST_TABLE = 100_000
Beta = Annotated[float, Between(0, 1)]
Count = Annotated[int, Between(1, LARGEST_TABLE)]


@dataclass(frozen=True)
class Levels:
    """settings: by the keys of `diffusion`, as far as they are stated. alpha_bar: (T,) float64, the table of a discrete
    process. tolerance: relative, of that table."""

    settings: dict[str, Any] = field(default_factory=dict)
    alpha_bar: Tensor | None = None
    tolerance: float = 1e-4

    def differing(self, config: DiffusionConfig) -> str:
        """In words, what differs from the levels of `config`, as "diffusion.schedule=linear"; "" where nothing that is
        stated does."""
        process = PROCESSES[config.prediction]
        cosine = self.settings.get("schedule") == config.schedule == "cosine"
        names = [name for name in SETTINGS[process] if not (cosine and name.startswith("beta_"))]
        others = [
            f"diffusion.{name}={self.settings[name]}"
            for name in names
            if name in self.settings and not _equal(self.settings[name], getattr(config, name))
        ]
        if others or self.alpha_bar is None or process != "discrete":
            return ", ".join(others)
        ours, theirs = Schedule(config).alpha_bar, self.alpha_bar
        if len(ours) == len(theirs) and torch.allclose(theirs, ours, rtol=self.tolerance, atol=self.tolerance / 10):
            return ""
        last = [f"{len(table):,} levels down to alpha_bar {float(table[-1]):.3g}" for table in (theirs, ours)]
        return f"{last[0]} (here {last[1]})"


def levels_of(config: DiffusionConfig) -> Levels:
    """All that sets the levels of a run."""
    return Levels({name: getattr(config, name) for name in SETTINGS[PROCESSES[config.prediction]]})


# --------------------------------------------------------------------------------------------------------------------
# diffusers' schedulers


@dataclass(frozen=True)
class _Scheduler:
    """What is read of a scheduler_config.json. None: the file lacks it."""

    _class_name: str | None = None
    prediction_type: str | None = None
    num_train_timesteps: Count | None = None
    beta_schedule: str | None = None
    beta_start: Beta | None = None
    beta_end: Beta | None = None
    trained_betas: list[Beta] | None = None
    rescale_betas_zero_snr: bool | None = None
    sigma_data: Annotated[float, Gt(0)] | None = None


def of_scheduler(facts: Mapping[str, Any], where: Path) -> tuple[str, Levels]:
    """(prediction, levels) of a scheduler's configuration; what it lacks is its class's default. prediction: as
    DiffusionConfig.prediction, or diffusers' name where we have none. Raises WeightsError."""
    given = _typed(_Scheduler, facts, where)
    defaults = _defaults(given._class_name or "")
    value = {name: stated if stated is not None else defaults.get(name) for name, stated in vars(given).items()}
    name, prediction = value["_class_name"] or "", value["prediction_type"] or "epsilon"
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return "flow", Levels(_stated(timesteps=value["num_train_timesteps"]))
    if name.startswith("EDM"):
        return "edm", Levels(_stated(sigma_data=value["sigma_data"]))
    prediction = OURS.get(prediction, prediction)
    rescaled = value["rescale_betas_zero_snr"]
    if value["trained_betas"]:
        betas = torch.tensor(value["trained_betas"], dtype=torch.float64)
        return prediction, Levels({}, _rescaled(torch.cumprod(1 - betas, dim=0), bool(rescaled)))
    schedule = value["beta_schedule"]
    settings = _stated(
        schedule=SCHEDULES.get(schedule or "", schedule),
        timesteps=value["num_train_timesteps"],
        beta_start=value["beta_start"],
        beta_end=value["beta_end"],
        zero_terminal_snr=False if rescaled is None and defaults else rescaled,
    )
    return prediction, Levels(settings)


def _defaults(name: str) -> dict[str, Any]:
    """The default arguments of a scheduler class of diffusers; {} for another name."""
    if not re.fullmatch(r"[A-Za-z0-9]{1,60}Scheduler", name):
        return {}
    import diffusers

    try:
        arguments = inspect.signature(getattr(diffusers, name).__init__).parameters
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return {}
    return {key: facts.default for key, facts in arguments.items() if facts.default is not facts.empty}


# --------------------------------------------------------------------------------------------------------------------
# Single files


@dataclass(frozen=True)
class _Diffusion:
    """What our own files state of the process. None: the file lacks it."""

    schedule: str | None = None
    timesteps: Count | None = None
    beta_start: Beta | None = None
    beta_end: Beta | None = None
    zero_terminal_snr: bool | None = None
    sigma_data: Annotated[float, Gt(0)] | None = None


def of_file(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], where: Path) -> tuple[str | None, Levels]:
    """(prediction, levels) of a single file's tensors and facts. prediction: as of_scheduler, None where the file does
    not tell it. Raises WeightsError, also for a file that contradicts itself."""
    prediction = facts.get("prediction")
    if prediction is not None and not isinstance(prediction, str):
        raise WeightsError(f"{where}: the prediction in its metadata is a {type(prediction).__name__}, not text")
    prediction = OURS.get(prediction, prediction) if prediction else None
    if V_PRED in tensors:
        if prediction not in (None, "v"):
            raise WeightsError(f"{where} says prediction={prediction} and holds {V_PRED}, which says v: mend the file")
        prediction = "v"
    settings = dict(vars(_typed(_Diffusion, facts.get("diffusion", {}), where)))
    alpha_bar, tolerance = _table(tensors, where)
    if ZTSNR in tensors:
        settings["zero_terminal_snr"] = True
        alpha_bar = None if alpha_bar is None else _rescaled(alpha_bar, True)
    return prediction, Levels(_stated(**settings), alpha_bar, tolerance)


def marks(config: DiffusionConfig) -> dict[str, Tensor]:
    """The empty tensors that tell ComfyUI how a model was trained."""
    names = [V_PRED] * (config.prediction == "v") + [ZTSNR] * config.zero_terminal_snr
    return {name: torch.zeros(0) for name in names}


def _table(tensors: Mapping[str, Tensor], where: Path) -> tuple[Tensor | None, float]:
    """alpha_bar (T,) of a file's tables and how exact it is; (None, 0) where it has none."""
    for name in ("alphas_cumprod", "betas"):
        table = tensors.get(name)
        if table is None:
            continue
        if table.ndim != 1 or not 1 <= len(table) <= LARGEST_TABLE or not table.is_floating_point():
            raise WeightsError(f"{where}: {name} is no table of noise levels: its shape is {tuple(table.shape)}")
        values = table.double()
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise WeightsError(f"{where}: {name} holds values that are not from 0 to 1")
        alpha_bar = values if name == "alphas_cumprod" else torch.cumprod(1 - values, dim=0)
        return alpha_bar, max(1e-4, 8 * torch.finfo(table.dtype).eps)
    return None, 0.0


def _rescaled(alpha_bar: Tensor, rescale: bool) -> Tensor:
    """With zero terminal SNR, unless it has that already."""
    return zero_terminal_snr(alpha_bar) if rescale and len(alpha_bar) > 1 and float(alpha_bar[-1]) > 0 else alpha_bar


def _typed(cls: Any, facts: Any, where: Path) -> Any:
    try:
        return build(cls, facts, unknown="pass")
    except ParseError as error:
        raise WeightsError(f"{where}: {error}") from None


def _stated(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _equal(mine: Any, other: Any) -> bool:
    numbers = isinstance(mine, int | float) and isinstance(other, int | float)
    return math.isclose(mine, other, rel_tol=1e-6) if numbers else bool(mine == other)
