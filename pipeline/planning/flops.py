"""How much of a device's arithmetic training uses: model FLOP/s over the device's peak (Chowdhery et al. 2022, MFU)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch

from pipeline.config import ModelConfig
from pipeline.planning.cost import Pool, classifier_cost, unet_cost
from pipeline.planning.plan.machines import gpu_of

Flops = Callable[[tuple[int, ...], int], int]
"""(latent shape (C, h, w), context length) -> FLOPs of forward and backward pass of one image."""


def image_flops(config: ModelConfig, extra_channels: int = 0) -> Flops:
    """Training FLOPs of an image in a UNet. extra_channels: that its task concatenates. Recomputation by activation
    checkpointing is not counted: it is no progress."""

    config = replace(config, in_channels=config.in_channels + extra_channels)

    @lru_cache
    def flops(shape: tuple[int, ...], context: int) -> int:
        length = context if config.context_width else 0
        return sum(unet_cost(config, 1, shape[1], shape[2], length).training_flops().values())

    return flops


def classifier_flops(config: ModelConfig, classes: int, pool: Pool) -> Flops:
    """The same, of a latent in a classifier."""

    @lru_cache
    def flops(shape: tuple[int, ...], context: int) -> int:
        return sum(classifier_cost(config, classes, pool, 1, shape[1], shape[2]).training_flops().values())

    return flops


def peak_tflops(device: torch.device, configured: float) -> float:
    """Peak of one device in TFLOP/s: the configured one, else that of a known GPU, else 0."""
    if configured or device.type != "cuda":
        return configured
    gpu = gpu_of(torch.cuda.get_device_name(device))
    return gpu.peak_tflops if gpu else 0.0
