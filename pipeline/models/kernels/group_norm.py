"""GroupNorm, optionally followed by SiLU, of channels-last images on a GPU, as Triton kernels.

PyTorch's own CUDA kernels read only channels-first memory: in the layout in which convolutions are fastest, every norm
would cost two copies. Here x (B, C, H, W) is stored as (B, H W, C). There are two passes over the image each way:

    forward     moments of chunks of rows, merged as in Chan et al. 1979; then the output
    backward    sums of dz and dz n of chunks of rows; then dx          (z = n w + b, n = (x - mean) rstd, y = silu(z))

Arithmetic is float32 for every dtype. Only the moments are kept for the backward pass. Sums are taken in a fixed order,
so results are the same at every call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    from pipeline.models.kernels import group_norm_triton as kernels
except ImportError:  # CPU builds of PyTorch come without Triton
    kernels = None  # type: ignore[assignment]

TILE = 8192
"""Elements of a program's tile (rows x channels)."""
PROGRAMS = 1024
"""Approximate number of programs of a pass: several for each multiprocessor, for every batch size."""


def available(x: Tensor) -> bool:
    """Whether the kernels support x (B, C, H, W)."""
    return kernels is not None and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    """norm(x), or silu(norm(x)), for x (B, C, H, W) -> the same shape, channels last, in x's dtype."""
    args = (x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    if torch.compiler.is_compiling():
        return OPERATOR(*args)[0]
    if not torch.is_grad_enabled():
        return forward(*args)[0]
    return _GroupNorm.apply(*args)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y, moments = forward(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        return (*backward(grads[0], x, weight, bias, moments, ctx.silu), None, None, None)


def _empty_like(x: Tensor) -> Tensor:
    """An uninitialized tensor like x, channels last."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
    """y like x, channels last, and moments (2, B, groups) float32: means and reciprocal standard deviations."""
    x = x.contiguous(memory_format=torch.channels_last)
    B, C, H, W = x.shape
    rows, block_r, block_c, chunk_rows, chunks = _tiling(B, C, H * W)
    chunk_moments = torch.empty(2, B, chunks, C, device=x.device, dtype=torch.float32)
    kernels.moments[(B, chunks)](x, chunk_moments, B * chunks * C, rows, C, chunks, chunk_rows, block_r, block_c)
    moments = torch.empty(2, B, groups, device=x.device, dtype=torch.float32)
    width = C // groups
    kernels.merge[(B, groups)](
        chunk_moments,
        moments,
        B * chunks * C,
        B * groups,
        rows,
        C,
        chunks,
        chunk_rows,
        groups,
        width,
        eps,
        _next_power(chunks),
        _next_power(width),
    )
    y = _empty_like(x)
    kernels.apply[(B, chunks)](
        x, y, weight, bias, moments, B * groups, rows, C, groups, width, chunk_rows, silu, block_r, block_c
    )
    return y, moments


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (channels last), weight and bias, each in the dtype of its tensor."""
    dy, x = (t.contiguous(memory_format=torch.channels_last) for t in (dy, x))
    B, C, H, W = x.shape
    groups = moments.shape[2]
    width = C // groups
    rows, block_r, block_c, chunk_rows, chunks = _tiling(B, C, H * W)
    chunk_sums = torch.empty(2, B, chunks, C, device=x.device, dtype=torch.float32)
    kernels.sums[(B, chunks)](
        dy, x, weight, bias, moments, chunk_sums, B * groups, B * chunks * C, rows, C, groups, width, chunks,
        chunk_rows, silu, block_r, block_c,
    )  # fmt: skip
    sums = chunk_sums.sum(dim=2)  # (2, B, C): of dz, of dz n
    means = (sums * weight.float()).view(2, B, groups, width).sum(dim=3) / (rows * width)
    dx = _empty_like(x)
    kernels.differentiate[(B, chunks)](
        dy, x, dx, weight, bias, moments, means, B * groups, rows, C, groups, width, chunk_rows, silu, block_r, block_c
    )
    dbias, dweight = sums.sum(dim=1)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _next_power(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def _tiling(B: int, C: int, rows: int) -> tuple[int, int, int, int, int]:
    """(rows, rows of a tile, channels of a tile, rows of a program, programs per image)."""
    block_c = _next_power(C)
    block_r = max(1, min(TILE // block_c, _next_power(rows)))
    chunk_rows = block_r * max(1, math.ceil(rows * B / (block_r * PROGRAMS)))
    return rows, block_r, block_c, chunk_rows, math.ceil(rows / chunk_rows)


def _register() -> Any:
    """`forward` as an operator that torch.compile does not trace, with its backward pass."""
    forward_op = torch.library.custom_op(
        "latentmill::group_norm",
        forward,
        mutates_args=(),
        schema="(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> (Tensor, Tensor)",
    )
    backward_op = torch.library.custom_op(
        "latentmill::group_norm_backward",
        backward,
        mutates_args=(),
        schema="(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor moments, bool silu) -> "
        "(Tensor, Tensor, Tensor)",
    )

    @forward_op.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor]:
        return _empty_like(x), x.new_empty(2, x.shape[0], groups, dtype=torch.float32)

    @backward_op.register_fake
    def _(
        dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _empty_like(x), torch.empty_like(weight), torch.empty_like(bias)

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, _, _, silu = inputs
        ctx.save_for_backward(x, weight, bias, output[1])
        ctx.silu = silu

    def differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        return (*backward_op(dy, x, weight, bias, moments, ctx.silu), None, None, None)

    forward_op.register_autograd(differentiate, setup_context=save_inputs)
    return forward_op


OPERATOR = _register()
