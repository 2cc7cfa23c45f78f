"""Puts a calibration together: measures layers, networks and predictions, and fits what steps take beside layers."""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config import AutoencoderConfig, CalibrateConfig, RunConfig, TrainConfig
from pipeline.config.loading.folders import groups
from pipeline.config.loading.load import load
from pipeline.distributed.place import cores
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.planning.cost import unet_cost
from pipeline.planning.memory import Precision
from pipeline.planning.parts import Cost
from pipeline.planning.rates.calibration import Calibration, Network
from pipeline.planning.rates.fitting import fitted
from pipeline.planning.rates.layers import NAMES, Layers, Terms
from pipeline.planning.rates.rates import step_seconds
from pipeline.training.engines.base import pick_precision
from pipeline.training.pace import networks, predictions
from pipeline.training.pace.layers import layer_rates
from pipeline.training.pace.references import REFERENCES, Reference

if TYPE_CHECKING:
    from pipeline.data.format.contract import Contract

SHARES = {"layers": 0.35, "networks": 0.35, "predictions": 0.2, "own": 0.1}
"""Shares of the time."""
PRIOR = (1.0, 0.0, 0.0)
"""Of NAMES: as long as layers alone take, and nothing beside them."""
TRUST = (0.5, 0.02, 0.02)
STEP_PRIOR, STEP_TRUST = (*PRIOR, 0.0, 1.0, 0.0), (*TRUST, 0.02, 0.2, 0.02)
"""The same with what a step takes by parameter, for Muon's products, and whatever the network."""


def calibrate(config: CalibrateConfig, world: World) -> Calibration:
    """Measure this machine, as one of the ranks that do so at the same time. Collective. Raises ConfigError for an
    experiment that there is not."""
    device = world.device.type
    own = world.together(lambda: experiment(config, world))
    sizes = world.together(lambda: sizes_of(own, config) if own is not None else Sizes(0))
    logging.getLogger("DeepSpeed").disabled = True  # it warns of its optimizer at every network
    base = replace(networks.base_config(device, config.precision), compile=config.compile)
    dtype = pick_precision(base, world.device)
    rates = layer_rates(world, dtype, SHARES["layers"] * config.seconds)
    layers = Layers(rates)
    references = REFERENCES[device]
    each = SHARES["networks"] * config.seconds / len(references)
    measured = [(one, *networks.of_reference(one, base, world, each)) for one in references]
    precision: Precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    step = fit_steps(layers, measured, world.size, precision)
    each = SHARES["predictions"] * config.seconds / (len(references) + 3)
    unets = [one for one in references if one.optimizer == "adamw"]
    passes = [predictions.of_unet(one, world, each) for one in unets]
    forward = fit_passes(layers, passes, PRIOR)
    stages = predictions.of_first_stages(world, 2 * each)
    prior = tuple(getattr(forward, name) for name in NAMES)
    calibration = Calibration(
        device=torch.cuda.get_device_name(world.device) if device == "cuda" else "cpu",
        machine=machine(world),
        date=datetime.date.today().isoformat(),
        versions={"python": sys.version.split()[0]} | {name: version(name) for name in ("torch", "deepspeed")},
        processes=world.size,
        threads=torch.get_num_threads(),
        precision=precision,
        compile=config.compile,
        layers=tuple(rates),
        training=_terms(step[:3]),
        parameter_s=step[3],
        muon=step[4],
        step_s=step[5],
        forward=forward,
        first_stage=fit_passes(layers, stages, prior),
        decoded_pixels_s=predictions.decoded_pixels_s(world, each),
        networks=(),
    )
    records = [
        networks.network(
            one.name,
            cost,
            one.images,
            one.optimizer,
            step_s,
            step_seconds(layers, calibration, cost, optimizer=one.optimizer),
        )
        for one, step_s, cost in measured
    ]
    if own is not None:
        records.append(of_own(own, sizes, config, calibration, layers, world))
    return replace(calibration, networks=tuple(records))


def fit_steps(
    layers: Layers, measured: Sequence[tuple[Reference, float, Cost]], world: int, precision: Precision
) -> list[float]:
    """What steps take: layers, elements and pieces as in Terms, then for a parameter, for Muon and for every step."""
    rows, seconds = [], []
    for one, step_s, cost in measured:
        muon = layers.muon(cost, precision) / world if one.optimizer == "muon" else 0.0
        rows.append((*layers.amounts(cost, "training"), float(cost.parameters), muon, 1.0))
        seconds.append(step_s)
    return fitted(rows, seconds, STEP_PRIOR, STEP_TRUST)


def fit_passes(layers: Layers, passes: Sequence[predictions.Passed], prior: Sequence[float]) -> Terms:
    """What predictions take. prior: of NAMES, near which the figures stay that the passes say little about."""
    rows = [layers.amounts(one.cost, "forward") for one in passes]
    return _terms(fitted(rows, [one.seconds for one in passes], prior, TRUST))


def _terms(values: Sequence[float]) -> Terms:
    return Terms(**dict(zip(NAMES, values, strict=True)))


# --------------------------------------------------------------------------------------------------------------------
# The network that is asked for by name


def experiment(config: CalibrateConfig, world: World) -> RunConfig | None:
    """The configuration of the experiment that is to be measured too; None for none. Raises ConfigError."""
    if not config.experiment:
        return None
    verb = "autoencoder" if config.experiment in groups("autoencoder")["experiment"] else "train"
    own: RunConfig = load(verb, [f"experiment={config.experiment}", "data.train=none", "run=none"])
    micro = config.micro_batch or own.optim.micro_batch or max(1, own.optim.batch // world.size)
    optim = replace(own.optim, batch=micro * world.size, micro_batch=0)
    device = world.device.type
    own = replace(own, optim=optim, device=device, precision=config.precision)  # type: ignore[arg-type]
    if isinstance(own, TrainConfig):
        if not own.task.draws:
            raise ConfigError(f"experiment={config.experiment}: a classifier is told from its layers: leave it out")
        own = replace(own, compile=config.compile)
    return own


@dataclass(frozen=True)
class Sizes:
    """side: of latents or pictures. tokens: that a network attends to. channels: beside those of the latents."""

    side: int
    tokens: int = 0
    channels: int = 0


def sizes_of(own: RunConfig, config: CalibrateConfig) -> Sizes:
    """The sizes of the experiment's samples: those of a cache where one is given. Raises DatasetError, StorageError,
    ConfigError."""
    if isinstance(own, AutoencoderConfig):
        return Sizes(own.crop or config.side or _picture_side(config.data) or 256)
    assert isinstance(own, TrainConfig), "no other verb trains"
    attends = bool(own.model.context_width)
    if not config.data:
        return Sizes(config.side or 32, config.tokens * attends)
    contract = _contract(config.data)
    return Sizes(contract.latent_shape[1], own.task.tokens(contract) * attends, own.task.channels(contract))


def of_own(
    own: RunConfig, sizes: Sizes, config: CalibrateConfig, calibration: Calibration, layers: Layers, world: World
) -> Network:
    """The record of the experiment's network. Collective."""
    images, seconds, side = own.optim.batch // world.size, SHARES["own"] * config.seconds, sizes.side
    if isinstance(own, AutoencoderConfig):
        step_s, cost = networks.of_autoencoder(own, world, side, images, seconds)
    else:
        assert isinstance(own, TrainConfig), "no other verb trains"
        model = replace(own.model, in_channels=own.model.in_channels + sizes.channels)
        step_s = networks.of_unet(model, own, world, side, sizes.tokens, images, seconds)
        cost = unet_cost(model, images, side, side, sizes.tokens)
    predicted = step_seconds(layers, calibration, cost, optimizer=own.optim.name)
    return networks.network(config.experiment, cost, images, own.optim.name, step_s, predicted)


def _contract(url: str) -> Contract:
    """The contract of a cache."""
    from pipeline.data.format.manifest import load_manifest
    from pipeline.storage.urls import open_storage

    return load_manifest(open_storage(url)).contract


def _picture_side(cache: str) -> int:
    """The larger side of the pictures of a cache; 0 without one."""
    return max(max(size) for size in _contract(cache).buckets) if cache else 0


def machine(world: World) -> str:
    """The processor, or the GPU, in words."""
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    return f"{processor()}, {cores()} cores"


def processor() -> str:
    """The CPU's name; on Linux alone it is known."""
    described = Path("/proc/cpuinfo")
    for line in described.read_text(encoding="utf-8").splitlines() if described.exists() else ():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return "an unknown processor"
