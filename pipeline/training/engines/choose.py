"""Chooses the engine: forward, backward, gradient reduction and the optimizer step.

Two engines have one interface (base.py): DeepSpeedEngine, which partitions the state over ranks (ZeRO stages 0 to 3),
and TorchEngine, plain PyTorch on one process, with which every stage is compared. The stages differ in where a rank's
share of the fp32 master weights, their gradients and the optimizer's state lie (placement.py).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pipeline.config import RunConfig
from pipeline.distributed.world import World
from pipeline.training.engines.base import Engine
from pipeline.training.engines.deepspeed import DeepSpeedEngine
from pipeline.training.engines.plain import TorchEngine


def make_engine(module: nn.Module, config: RunConfig, world: World) -> Engine:
    """The engine that the configuration names. module: its parameters are fp32 and equal on all ranks."""
    return ENGINES[config.deepspeed.engine](module, config, world)


ENGINES: dict[str, Callable[[nn.Module, RunConfig, World], Engine]] = {
    "deepspeed": DeepSpeedEngine,
    "torch": TorchEngine,
}
