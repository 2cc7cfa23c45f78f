"""Measures the rates of layers by themselves, by kind and size (planning/rates/layers.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.distributed.world import World
from pipeline.inference.packed import pack
from pipeline.inference.precision import products
from pipeline.models.kernels.convolution import Conv3x3
from pipeline.models.kernels.fused import attend
from pipeline.planning.parts import Kind
from pipeline.planning.rates.layers import LayerRate
from pipeline.training.pace.timing import median_s

HEAD = 32
"""Width of an attention head."""
TAPS = 9
TENSORS = 4 * 8
"""Bytes that a measurement takes for each number of its input, at most: eight tensors in float32."""


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
    jobs = _fitting(list(_jobs(SIZES[world.device.type])), world)
    each = seconds / len(jobs) / 2
    return [_rate(job, world, dtype, each) for job in jobs]


@dataclass(frozen=True)
class _Work:
    """What is timed of a layer, whose tensors live as long."""

    train: Callable[[], None]
    predict: Callable[[], None]


@dataclass(frozen=True)
class _Job:
    """A layer to measure. flops: of a forward pass; a backward pass takes twice as many. numbers: of the tensor that it
    is applied to. make: makes the layer on a device."""

    kind: Kind
    size: float
    rows: int
    flops: float
    numbers: int
    make: Callable[[torch.device, torch.dtype], _Work]


def _fitting(jobs: list[_Job], world: World) -> list[_Job]:
    """The jobs whose tensors fit the GPU of every rank beside what lies there; all on a CPU. Collective."""
    if world.device.type != "cuda":
        return jobs
    free = min(world.gather(torch.cuda.mem_get_info(world.device)[0]))
    return [job for job in jobs if TENSORS * job.numbers <= free]


def _rate(job: _Job, world: World, dtype: torch.dtype, seconds: float) -> LayerRate:
    """Makes a layer, and measures it. Collective."""
    work = job.make(world.device, dtype)
    return LayerRate(
        kind=job.kind,
        size=job.size,
        rows=job.rows,
        training=3 * job.flops / median_s(work.train, world, seconds),
        forward=job.flops / median_s(work.predict, world, seconds),
    )


def _jobs(sizes: Sizes) -> Iterator[_Job]:
    for channels in sizes.channels:
        for batch, side in sizes.images:
            rows = batch * side * side
            flops = 2.0 * rows * TAPS * channels**2
            if flops <= sizes.most:
                make = partial(_convolution, batch, side, channels)
                yield _Job("conv", math.sqrt(TAPS) * channels, rows, flops, rows * channels, make)
    for width in sizes.widths:
        for rows in sizes.rows:
            flops = 2.0 * rows * width**2
            if flops <= sizes.most:
                yield _Job("linear", float(width), rows, flops, rows * width, partial(_linear, rows, width))
    for keys, batch in sizes.keys:
        shape = (batch, sizes.heads, keys, HEAD)
        flops = 4.0 * batch * keys * keys * sizes.heads * HEAD
        yield _Job("attention", float(keys), batch * keys, flops, 3 * math.prod(shape), partial(_attention, shape))


def _convolution(batch: int, side: int, channels: int, device: torch.device, dtype: torch.dtype) -> _Work:
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    if device.type == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
    return _of_layer(Conv3x3(channels, channels).to(device, dtype), x)


def _linear(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> _Work:
    x = torch.randn(rows, width, device=device, dtype=dtype)
    return _of_layer(nn.Linear(width, width).to(device, dtype), x)


def _of_layer(layer: nn.Module, x: Tensor) -> _Work:
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
        with torch.no_grad(), products(tf32=False):
            packed[0](whole)

    return _Work(train, predict)


def _attention(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> _Work:
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(attend(q, k, v))

    def train() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v).backward(gradient)

    whole = [tensor.detach().float() for tensor in (q, k, v)]

    def predict() -> None:
        with torch.no_grad(), products(tf32=False):
            attend(*whole)

    return _Work(train, predict)
