"""Measures the rates of layers by themselves, by kind and size (planning/rates/layers.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.distributed.world import World
from pipeline.inference.packed import pack
from pipeline.models.kernels.convolution import Conv3x3
from pipeline.models.kernels.fused import attend
from pipeline.planning.parts import Kind
from pipeline.planning.rates.layers import LayerRate
from pipeline.training.pace.timing import median_s

HEAD = 32
"""Width of an attention head."""
TAPS = 9


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device. convolutions, linears: channels, and positions (batch, side) of an image or
    rows. attention: keys, as many queries, and batches. most: FLOPs of a forward pass beyond which a size is left
    out."""

    channels: tuple[int, ...]
    images: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    keys: tuple[tuple[int, int], ...]
    heads: int
    most: float


SIZES = {
    "cpu": Sizes(
        channels=(16, 32, 64, 128, 256, 512),
        images=((8, 8), (16, 16)),
        widths=(64, 256, 1024),
        rows=(512, 4096),
        keys=((32, 64), (64, 64), (256, 16), (1024, 4)),
        heads=4,
        most=6e9,
    ),
    "cuda": Sizes(
        channels=(64, 128, 320, 640, 1280),
        images=((64, 16), (64, 64)),
        widths=(320, 1280, 5120),
        rows=(16384, 262144),
        keys=((77, 64), (256, 64), (1024, 64), (4096, 32)),
        heads=10,
        most=2e13,
    ),
}


def layer_rates(world: World, dtype: torch.dtype, seconds: float) -> list[LayerRate]:
    """The rates of layers of every kind. dtype: of weights and activations in training; predictions are in float32.
    seconds: to spend in all. Collective."""
    jobs = list(_jobs(SIZES[world.device.type], world.device, dtype))
    each = seconds / len(jobs) / 2
    return [
        LayerRate(
            kind=job.kind,
            size=job.size,
            rows=job.rows,
            training=3 * job.flops / median_s(job.train, world, each),
            forward=job.flops / median_s(job.predict, world, each),
        )
        for job in jobs
    ]


@dataclass(frozen=True)
class _Job:
    """A layer to measure. flops: of a forward pass; a backward pass takes twice as many."""

    kind: Kind
    size: float
    rows: int
    flops: float
    train: Callable[[], None]
    predict: Callable[[], None]


def _jobs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[_Job]:
    for channels in sizes.channels:
        for batch, side in sizes.images:
            rows = batch * side * side
            flops = 2.0 * rows * TAPS * channels**2
            if flops <= sizes.most:
                x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
                if device.type == "cuda":
                    x = x.contiguous(memory_format=torch.channels_last)
                layer = Conv3x3(channels, channels).to(device, dtype)
                yield _of_layer("conv", math.sqrt(TAPS) * channels, rows, flops, layer, x)
    for width in sizes.widths:
        for rows in sizes.rows:
            flops = 2.0 * rows * width**2
            if flops <= sizes.most:
                x = torch.randn(rows, width, device=device, dtype=dtype)
                yield _of_layer("linear", float(width), rows, flops, nn.Linear(width, width).to(device, dtype), x)
    for keys, batch in sizes.keys:
        shape = (batch, sizes.heads, keys, HEAD)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        flops = 4.0 * batch * keys * keys * sizes.heads * HEAD
        yield _of_attention(float(keys), batch * keys, flops, q, k, v)


def _of_layer(kind: Kind, size: float, rows: int, flops: float, layer: nn.Module, x: Tensor) -> _Job:
    x.requires_grad_(True)
    gradient = torch.randn_like(layer(x))

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(gradient)

    packed: list[nn.Module] = []
    whole = x.detach().float()

    def predict() -> None:
        if not packed:  # after training, as it takes the weights
            packed.append(nn.Sequential(layer).requires_grad_(False).float())
            pack(packed[0])
        with torch.no_grad():
            packed[0](whole)

    return _Job(kind, size, rows, flops, train, predict)


def _of_attention(size: float, rows: int, flops: float, q: Tensor, k: Tensor, v: Tensor) -> _Job:
    gradient = torch.randn_like(attend(q, k, v))

    def train() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v).backward(gradient)

    whole = [tensor.detach().float() for tensor in (q, k, v)]

    def predict() -> None:
        with torch.no_grad():
            attend(*whole)

    return _Job("attention", size, rows, flops, train, predict)
