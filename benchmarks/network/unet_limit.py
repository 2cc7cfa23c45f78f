"""Lower bound of a UNet's time: FLOPs as counted by PyTorch, at the machine's best rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelConfig
from pipeline.models.unet.model import UNet

PRODUCT = 2048  # side of the matrices
IMAGES = ((16, 64, 32), (4, 320, 32), (1, 640, 32))  # (batch, channels, side) that convolutions are tried on
TURNS = 7


@dataclass(frozen=True)
class Work:
    """FLOPs (2 for a multiplication with its addition)."""

    products: float
    convolutions: float

    @property
    def total(self) -> float:
        return self.products + self.convolutions


@dataclass(frozen=True)
class Rates:
    """Best FLOP/s of this machine."""

    products: float
    convolutions: float

    def seconds(self, work: Work) -> float:
        """Time of the work at these rates."""
        return work.products / self.products + work.convolutions / self.convolutions

    def lines(self) -> list[str]:
        return [
            f"- matrix products of {PRODUCT}x{PRODUCT}: {self.products / 1e9:,.0f} GFLOP/s",
            f"- 3x3 convolutions, channels last, the fastest of {len(IMAGES)} sizes: "
            f"{self.convolutions / 1e9:,.0f} GFLOP/s",
        ]


def measure_rates(threads: int, dtype: str) -> Rates:
    """The fastest of several turns of each kind, in this process."""
    torch.set_num_threads(threads)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    a, b = (torch.randn(PRODUCT, PRODUCT).to(torch_dtype) for _ in range(2))
    convolutions = []
    for batch, channels, side in IMAGES:
        x = torch.randn(batch, channels, side, side).to(torch_dtype).contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(channels, channels, 3, 3).to(torch_dtype).contiguous(memory_format=torch.channels_last)
        flops = 2 * 9 * channels * channels * batch * side * side
        convolutions.append(flops / fastest(partial(F.conv2d, x, kernel, padding=1)))
    return Rates(2 * PRODUCT**3 / fastest(lambda: a @ b), max(convolutions))


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest turn, after two that are not timed."""
    seconds = []
    for _ in range(TURNS + 2):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


def counted(config: ModelConfig, batch: int, side: int, context: int, *, train: bool) -> Work:
    """FLOPs of a forward pass, or of forward and backward, counted by PyTorch on tensors without memory."""
    with torch.device("meta"):
        unet = UNet(config)
        x = torch.randn(batch, config.in_channels, side, side)
        timestep = torch.zeros(batch, dtype=torch.int64)
        tokens = torch.randn(batch, context, config.context_width)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        prediction = unet(x, timestep, tokens)
        if train:
            prediction.sum().backward()
    flop_counts = counter.get_flop_counts()["Global"]
    convolutions = sum(count for op, count in flop_counts.items() if "convolution" in str(op))
    return Work(sum(flop_counts.values()) - convolutions, convolutions)
