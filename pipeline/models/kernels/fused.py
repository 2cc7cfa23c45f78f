"""Pairs of operations that belong together, with backward passes that keep less than PyTorch would.

Each computes what its plain composition does. Where PyTorch compiles (torch.compile) or casts (autocast) by itself, the
plain composition is what it is given, and it fuses that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.kernels import group_norm
from pipeline.models.kernels.onednn import product

SCORES = 2**17
"""Queries x keys of a head up to which a matrix of scores is faster on a CPU than PyTorch's blocked attention."""


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) for x (B, C, H, W). Of what lies between, nothing is kept: it is computed again."""
    if group_norm.available(x):
        return group_norm.group_norm(norm, x, silu=True)
    if not _ours(x) or x.is_cuda:  # PyTorch's CUDA kernels want channels first, and copy by themselves
        return F.silu(norm(x))
    if not torch.is_grad_enabled():
        return F.silu(norm(x), inplace=True)
    return _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def norm_alone(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x) for x (B, C, H, W)."""
    return group_norm.group_norm(norm, x, silu=False) if group_norm.available(x) else norm(x)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """geglu(x weight^T + bias): (..., in_width) -> (..., C) for weight (2C, in_width), rows of values before gates.

    On a CPU in float32 values and gates are tensors of their own: gelu of every other stretch of memory is slower.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _ours(x):
        return _LinearGeglu.apply(x, weight, bias)
    return geglu(F.linear(x, weight, bias))


def geglu(up: Tensor) -> Tensor:
    """value x gelu(gate) (Shazeer 2020) for up (..., 2C), values before gates -> (..., C). Only `up` is kept."""
    if not _ours(up):
        value, gate = up.chunk(2, dim=-1)
        return value * F.gelu(gate)
    if not torch.is_grad_enabled():
        value, gate = up.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)
    return _Geglu.apply(up)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: (B, heads, L, width), (B, heads, M, width) twice -> (B, L, heads x width)."""
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.dtype == torch.bfloat16:
        # PyTorch's bfloat16 attention is ten times slower than its float32 one in a CPU's backward pass.
        return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)
    if on_cpu and q.shape[2] * k.shape[2] <= SCORES:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(dim=-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def _ours(x: Tensor) -> bool:
    device = x.device.type
    return device in ("cpu", "cuda") and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device)


def _format(x: Tensor) -> torch.memory_format:
    """The memory format that x has, or comes closest to."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        B, C, H, W = x.shape
        x = x.contiguous(memory_format=_format(x))
        normed, mean, rstd = torch.native_group_norm(x, weight, bias, B, C, H * W, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(normed, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        B, C, H, W = x.shape
        normed, *_ = torch.native_group_norm(x, weight, bias, B, C, H * W, ctx.groups, ctx.eps)
        # The backward pass of the norm reads all three in one memory format, and does not look whether they are.
        grad = grads[0].contiguous(memory_format=_format(x))
        grad = torch.ops.aten.silu_backward.grad_input(grad, normed, grad_input=normed)
        needed = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, weight, B, C, H * W, ctx.groups, needed)
        return (*found, None, None)


class _LinearGeglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        values, gates = (product(rows, w, b) for w, b in zip(weight.chunk(2), bias.chunk(2), strict=True))
        ctx.save_for_backward(x, weight, values, gates)
        return F.gelu(gates).mul_(values).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, weight, values, gates = ctx.saved_tensors
        rows, grad = x.flatten(0, -2), grads[0].reshape(values.shape)
        of_values, of_gates = F.gelu(gates).mul_(grad), torch.mul(grad, values)
        torch.ops.aten.gelu_backward.grad_input(of_gates, gates, grad_input=of_gates)
        of_weight, halves = torch.empty_like(weight), weight.chunk(2)
        for half, out in zip((of_values, of_gates), of_weight.chunk(2), strict=True):
            torch.mm(half.t(), rows, out=out)
        of_bias = torch.cat([of_values.sum(0), of_gates.sum(0)])
        of_x = torch.mm(of_values, halves[0]).addmm_(of_gates, halves[1])
        return of_x.view_as(x), of_weight, of_bias


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor) -> Tensor:
        ctx.save_for_backward(up)
        value, gate = up.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (up,) = ctx.saved_tensors
        value, gate = up.chunk(2, dim=-1)
        grad = torch.empty_like(up)
        of_value, of_gate = grad.chunk(2, dim=-1)
        torch.ops.aten.gelu.out(gate, out=of_value)  # in place all through: `up` is the largest tensor there is
        of_value.mul_(grads[0])
        torch.mul(grads[0], value, out=of_gate)
        torch.ops.aten.gelu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return grad
