"""The file that `latentmill calibrate` writes and a plan reads: what was measured on this machine, read strictly."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pipeline.config.values.bounds import Ge, Gt
from pipeline.errors import ConfigError, ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.planning.rates.layers import LayerRate, Terms

VERSION: Literal[1] = 1
VARIABLE = "LATENTMILL_RATES"
"""Environment variable that names the file of rates, where it is not DEFAULT."""
DEFAULT = "~/.config/latentmill/rates.json"
MOST_BYTES = 4_000_000
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network whose steps were measured."""

    name: str
    """What it is called, for people."""
    parameters: Annotated[int, Ge(1)]
    """Number of parameters."""
    flops: Annotated[float, Gt(0)]
    """FLOPs of forward and backward pass of one image."""
    images: Annotated[int, Ge(1)]
    """Images of a step and rank, in one micro-batch."""
    optimizer: Optimizer = "adamw"
    """Optimizer of its steps."""
    step_s: Annotated[float, Gt(0)]
    """Seconds of a training step: the median over steps of the slowest rank."""
    fitted_s: Annotated[float, Gt(0)]
    """Seconds of the same step by the fitted model, which shows how well that fits."""

    @property
    def images_per_s(self) -> float:
        """Images that a rank trains on in a second."""
        return self.images / self.step_s


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one run of `latentmill calibrate` found, for one device, number of processes and precision."""

    device: str
    """cpu, or the GPU's name as PyTorch gives it."""
    machine: str
    """Processor and number of cores, in words."""
    date: str
    """Day on which it was measured, YYYY-MM-DD."""
    versions: dict[str, str]
    """Versions of Python, PyTorch and DeepSpeed."""
    processes: Annotated[int, Ge(1)]
    """Ranks that were measured at the same time, on this machine."""
    threads: Annotated[int, Ge(1)]
    """CPU threads of each."""
    precision: Literal["fp32", "bf16"]
    """Of forward and backward passes."""
    compile: bool
    """Whether the networks were compiled."""
    layers: tuple[LayerRate, ...]
    """Rates of layers by themselves."""
    training: Terms
    """What a training step takes for each micro-batch."""
    parameter_s: Annotated[float, Ge(0)]
    """Seconds of a step for each parameter: gradient reduced, measured and clipped, optimizer, average."""
    muon: Annotated[float, Ge(0)]
    """Seconds of a step per second of Muon's products at the rates of layers alone; 0 = not measured."""
    step_s: Annotated[float, Ge(0)]
    """Seconds of every step, whatever the network."""
    forward: Terms
    """What a prediction of a UNet takes in float32, with its weights packed where that is done."""
    first_stage: Terms
    """What a pass of an autoencoder's encoder or decoder takes."""
    decoded_pixels_s: Annotated[float, Gt(0)]
    """Pixels of JPEGs that one core decodes, resizes and crops in a second."""
    networks: tuple[Network, ...]
    """The networks that the figures above were fitted to, and those that were asked for by name."""

    @property
    def words(self) -> str:
        """Machine and circumstances, in words."""
        ranks = f"{self.processes} process{'es' * (self.processes > 1)} of {self.threads} threads"
        compiled = ", compiled" if self.compile else ""
        return f"{self.machine}, {ranks}, {self.precision}{compiled}, measured on {self.date}"

    @property
    def key(self) -> tuple[str, int, int, str, bool]:
        """What a later calibration replaces."""
        return self.device, self.processes, self.threads, self.precision, self.compile


@dataclass(frozen=True, kw_only=True)
class Calibrations:
    """The whole file. calibrations: the newest last."""

    version: Literal[1]
    calibrations: tuple[Calibration, ...]


def place_of(path: str = "", environment: Mapping[str, str] = os.environ) -> Path:
    """The file of rates: `path`, else that of LATENTMILL_RATES, else ~/.config/latentmill/rates.json."""
    return Path(path or environment.get(VARIABLE, "") or DEFAULT).expanduser()


def read(path: Path) -> tuple[Calibration, ...]:
    """What a file of rates holds. Raises ConfigError where it is not there, or is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"rates={path}: cannot be read ({error}); latentmill calibrate writes one") from None
    try:
        found = build(Calibrations, parse_json(data, MOST_BYTES)).calibrations
        for one in found:
            if not one.layers:
                raise ParseError("layers=[]: one rate or more is wanted")
    except ParseError as error:
        raise ConfigError(
            f"rates={path}: no file of rates of version {VERSION} ({error}); remove it, and run latentmill calibrate"
        ) from None
    return found


def require_writable(path: Path) -> None:
    """Raise ConfigError where `add` could not write, before anything is measured."""
    if path.exists():
        read(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise ConfigError(f"dest={path}: cannot be written ({error}); give another file") from None


def add(path: Path, calibration: Calibration) -> None:
    """Write a calibration into a file of rates, in place of an earlier one of the same circumstances. The file is
    whole at all times. Raises ConfigError."""
    kept = [one for one in (read(path) if path.exists() else ()) if one.key != calibration.key]
    whole = Calibrations(version=VERSION, calibrations=(*kept, calibration))
    text = json.dumps(dataclasses.asdict(whole), indent=1) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"dest={path}: cannot be written ({error}); give another file") from None
