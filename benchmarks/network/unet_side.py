"""One side of `benchmarks.unet` in a process of its own: builds the network, takes steps, prints what they took.

`python -m benchmarks.network.unet_side JSON`; the last line of standard output is JSON as well.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import ModelConfig, OptimConfig
from pipeline.config.loading.merge import from_dict
from pipeline.diffusion.conditioning import ContextCache
from pipeline.distributed.allocator import keep_memory
from pipeline.inference.packed import pack
from pipeline.interchange import unet as convert
from pipeline.models.encoders.torchvision_ops import declare_torchvision_ops
from pipeline.models.unet.model import UNet
from pipeline.training.engines.optimizer import make_optimizer

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Order:
    """What a side is asked to do. side: a key of SIDES. weights: a safetensors file in diffusers' names. work: train
    or infer. model: a ModelConfig as a dict. context: tokens. warm: steps before the `steps` that are timed."""

    side: str
    weights: str
    work: str
    model: dict[str, Any]
    batch: int
    height: int
    width: int
    context: int
    dtype: str
    threads: int
    warm: int
    steps: int


@dataclass(frozen=True)
class Side:
    """A network ready to be timed, its optimizer, and what it runs in."""

    module: nn.Module
    forward: Forward
    optimizer: torch.optim.Optimizer | None


def ours(order: Order, config: ModelConfig, compiled: bool) -> Side:
    """This project's UNet as the trainer and the sampler use it."""
    keep_memory()
    with torch.device("meta"):
        unet = UNet(config)
    unet.load_state_dict(convert.from_diffusers(load_file(order.weights), config), assign=True)
    optimizer = make_optimizer(unet, OptimConfig()) if order.work == "train" else None
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
    if compiled:
        unet.compile_blocks()
    if order.work == "train":
        return Side(unet, unet, optimizer)
    if order.dtype == "fp32" and not compiled:
        pack(unet)  # and the rest as the sampler does over the steps of an image
    context_cache: ContextCache = {}

    def forward(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return unet(x, timestep, context, context_cache=context_cache)

    return Side(unet, forward, optimizer)


def diffusers(order: Order, config: ModelConfig, best: bool) -> Side:
    """UNet2DConditionModel: as diffusers' text-to-image training script uses it, or at its best settings."""
    declare_torchvision_ops()
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(**convert.diffusers_config(config))
    unet.load_state_dict(load_file(order.weights))
    network = unet
    if best:
        keep_memory()
        unet = unet.to(memory_format=torch.channels_last)
        network = torch.compile(unet)
    optimizer = None
    if order.work == "train":
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, fused=True if best else None)

    def forward(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        if best:
            x = x.contiguous(memory_format=torch.channels_last)
        return network(x, timestep, context, return_dict=False)[0]

    return Side(unet, forward, optimizer)


SIDES: dict[str, Callable[[Order, ModelConfig], Side]] = {
    "ours": lambda order, config: ours(order, config, compiled=False),
    "ours, compiled": lambda order, config: ours(order, config, compiled=True),
    "diffusers": lambda order, config: diffusers(order, config, best=False),
    "diffusers, best": lambda order, config: diffusers(order, config, best=True),
}


def inputs(order: Order, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, timestep, context and target, the same for every side."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(order.batch, config.in_channels, order.height, order.width, generator=g)
    timestep = torch.randint(0, 1000, (order.batch,), generator=g)
    context = torch.randn(order.batch, order.context, config.context_width, generator=g)
    return x, timestep, context, torch.randn(order.batch, config.out_channels, order.height, order.width, generator=g)


def measure(order: Order) -> dict[str, Any]:
    """Seconds of each timed step, of the first, the sum of the first prediction, and the process's peak memory."""
    torch.set_num_threads(order.threads)
    config = from_dict(ModelConfig, order.model)
    side = SIDES[order.side](order, config)
    x, timestep, context, target = inputs(order, config)

    def arithmetic() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if order.dtype == "bf16" else nullcontext()

    def infer() -> Tensor:
        with torch.no_grad(), arithmetic():
            return side.forward(x, timestep, context)

    def train() -> Tensor:
        assert side.optimizer is not None
        with arithmetic():
            prediction = side.forward(x, timestep, context)
        F.mse_loss(prediction.float(), target).backward()
        side.optimizer.step()
        side.optimizer.zero_grad(set_to_none=True)
        return prediction.detach()

    side.module.train(order.work == "train")
    step = {"train": train, "infer": infer}[order.work]
    began = time.perf_counter()
    prediction = step()
    first = time.perf_counter() - began
    for _ in range(order.warm):
        step()
    seconds = []
    for _ in range(order.steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "first": first, "output": prediction.float().flatten()[:64].tolist(), "peak": peak}


if __name__ == "__main__":
    print(json.dumps(measure(Order(**json.loads(sys.argv[1])))))
