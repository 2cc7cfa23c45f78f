"""Fused pairs of operations, whose backward passes keep less memory than PyTorch's would.

Each computes the same as its plain composition. Under torch.compile and autocast they run the plain composition, which
PyTorch then fuses or casts itself.
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
"""Queries x keys per head up to which a matrix of scores is faster on a CPU than PyTorch's blocked attention."""


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)) for x (B, C, H, W). The norm's output is not kept: the backward pass computes it again."""
    if group_norm.available(x):
        return group_norm.group_norm(norm, x, silu=True)
    if not _supported(x) or x.is_cuda:  # PyTorch's CUDA kernels read channels first, and copy if necessary
        return F.silu(norm(x))
    if not torch.is_grad_enabled():
        return F.silu(norm(x), inplace=True)
    return _NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def norm_alone(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x) for x (B, C, H, W), without an activation."""
    return group_norm.group_norm(norm, x, silu=False) if group_norm.available(x) else norm(x)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """geglu(x weight^T + bias): (..., in_width) -> (..., C) for weight (2C, in_width), rows of values, then gates.

    On a CPU in float32, values and gates are separate tensors: gelu of strided memory is slower.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _supported(x):
        return _LinearGeglu.apply(x, weight, bias)
    return geglu(F.linear(x, weight, bias))


def geglu(up: Tensor) -> Tensor:
    """value x gelu(gate) (Shazeer 2020) for up (..., 2C), values before gates -> (..., C). Only `up` is kept
    for the backward pass."""
    if not _supported(up):
        value, gate = up.chunk(2, dim=-1)
        return value * F.gelu(gate)
    if not torch.is_grad_enabled():
        value, gate = up.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)
    return _Geglu.apply(up)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: q (B, heads, L, width), k and v (B, heads, M, width) -> (B, L, heads x width).

    mask: bool, broadcastable to (B, heads, L, M), True where a query may attend to a key; None = everywhere.
    """
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.dtype == torch.bfloat16:
        # In a CPU's backward pass, PyTorch's bfloat16 attention is ten times slower than its float32 attention.
        return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)
    if on_cpu and q.shape[2] * k.shape[2] <= SCORES:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = scores.softmax(dim=-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def _supported(x: Tensor) -> bool:
    """Whether the fused operations take x, rather than their plain composition."""
    device = x.device.type
    return device in ("cpu", "cuda") and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device)


def _format(x: Tensor) -> torch.memory_format:
    """The memory format of x, or the closest one."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


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
        # The norm's backward pass requires all three in one memory format, and does not check that.
        grad = grads[0].contiguous(memory_format=_format(x))
        grad = torch.ops.aten.silu_backward.grad_input(grad, normed, grad_input=normed)
        needs_grad = list(ctx.needs_input_grad[:3])
        input_grads = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, rstd, weight, B, C, H * W, ctx.groups, needs_grad
        )
        return (*input_grads, None, None)


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
        values_grad, gates_grad = F.gelu(gates).mul_(grad), torch.mul(grad, values)
        torch.ops.aten.gelu_backward.grad_input(gates_grad, gates, grad_input=gates_grad)
        weight_grad, halves = torch.empty_like(weight), weight.chunk(2)
        for half, out in zip((values_grad, gates_grad), weight_grad.chunk(2), strict=True):
            torch.mm(half.t(), rows, out=out)
        bias_grad = torch.cat([values_grad.sum(0), gates_grad.sum(0)])
        x_grad = torch.mm(values_grad, halves[0]).addmm_(gates_grad, halves[1])
        return x_grad.view_as(x), weight_grad, bias_grad


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
        value_grad, gate_grad = grad.chunk(2, dim=-1)
        torch.ops.aten.gelu.out(gate, out=value_grad)  # all in place: `up` is the largest tensor of the network
        value_grad.mul_(grads[0])
        torch.mul(grads[0], value, out=gate_grad)
        torch.ops.aten.gelu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
        return grad
