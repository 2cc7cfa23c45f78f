"""The engine of plain PyTorch on one process, with which DeepSpeed's stages are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from pipeline.training.engines.base import Engine, pick_precision, split_batch
from pipeline.training.engines.optimizer import make_optimizer
from pipeline.training.engines.placement import Whole


class TorchEngine(Engine):
    """Plain PyTorch on one process; precision=bf16 is autocast around fp32 parameters."""

    def __init__(self, module: nn.Module, config: RunConfig, world: World) -> None:
        if world.size > 1:
            raise ConfigError(
                "deepspeed.engine=torch trains on one process; set launch.processes=1 or engine=deepspeed"
            )
        super().__init__(module.to(world.device), config.optim, world, split_batch(config.optim, 1)[1])
        dtype = pick_precision(config, world.device)
        self._autocast = dtype == torch.bfloat16
        self._optimizer = make_optimizer(self.module, config.optim)
        self._place(Whole(self._optimizer, self.module, world), dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self._autocast):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.micro_batches).backward()

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def destroy(self) -> None:
        del self._optimizer, self._placement, self._muon, self.module
