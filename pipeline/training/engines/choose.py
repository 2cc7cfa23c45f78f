"""The engine: forward, backward, gradient reduction and the optimizer step, partitioned over ranks by DeepSpeed ZeRO.

The only importer of deepspeed. Two engines behind one interface: DeepSpeedEngine (ZeRO stages 0 to 3) and TorchEngine
(plain PyTorch on one process, the oracle that every stage is compared with). What differs between the stages is where
a rank's share of the fp32 master weights, their gradients and the optimizer's state lie: see placement.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from pipeline.config import TrainConfig
from pipeline.distributed.world import World
from pipeline.training.engines.base import Engine
from pipeline.training.engines.deepspeed import DeepSpeedEngine
from pipeline.training.engines.plain import TorchEngine


def make_engine(module: nn.Module, config: TrainConfig, world: World) -> Engine:
    """The engine that the configuration names, around a module with fp32 parameters that are equal on all ranks."""
    return ENGINES[config.deepspeed.engine](module, config, world)


# --------------------------------------------------------------------------------------------------------------------
# Engines


ENGINES: dict[str, Callable[[nn.Module, TrainConfig, World], Engine]] = {
    "deepspeed": DeepSpeedEngine,
    "torch": TorchEngine,
}
