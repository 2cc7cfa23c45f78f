"""3x3 convolutions, by matrix products where few pixels meet a large weight on a CPU, and by Winograd's tiles where
networks are compiled there."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.kernels import winograd
from pipeline.models.kernels.onednn import product

PIXELS = 256
"""Pixels of a batch's output up to which products are faster: oneDNN puts the weight into its own order at every call,
which for few pixels takes longer than the convolution."""
WEIGHTS = 2**20
"""in_channels x out_channels from which on they are."""


class Conv3x3(nn.Conv2d):
    """(B, in_width, H, W) -> (B, width, ceil(H / stride), ceil(W / stride)), padded by one pixel of zeros.

    by_tiles: in float32 on a CPU by models/kernels/winograd.py where that is faster, for channels last.
    """

    by_tiles = False

    def __init__(self, in_width: int, width: int, stride: int = 1) -> None:
        super().__init__(in_width, width, 3, stride=stride, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        if self._by_winograd(input):
            return winograd.convolve(input, self.weight, self.bias)
        if self._by_products(input):
            return _Products.apply(input, self.weight, self.bias, self.stride[0])
        return super().forward(input)

    def _by_winograd(self, x: Tensor) -> bool:
        return self.by_tiles and self.stride[0] == 1 and self._in_float32(x) and winograd.pays(x, self.weight)

    def _by_products(self, x: Tensor) -> bool:
        pixels = x.shape[0] * x.shape[2] * x.shape[3] // self.stride[0] ** 2
        few = pixels <= PIXELS and self.in_channels * self.out_channels >= WEIGHTS
        return few and self._in_float32(x) and not torch.compiler.is_compiling()

    def _in_float32(self, x: Tensor) -> bool:
        """And on a CPU, whatever casts by itself."""
        float32 = x.dtype == self.weight.dtype == torch.float32
        return x.device.type == "cpu" and float32 and not torch.is_autocast_enabled("cpu")


class _Products(torch.autograd.Function):
    """The weight as a matrix (width, 9 in_width), times the patches of all pixels (9 in_width, B H W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        height, width = (-(-side // stride) for side in x.shape[2:])
        out = torch.addmm(bias[:, None], weight.flatten(1), _patches(x, stride))
        return out.view(len(weight), len(x), height, width).transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].transpose(0, 1).reshape(len(weight), -1)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            patches = (weight.flatten(1).t() @ grad).view(weight[0].numel(), len(x), -1).transpose(0, 1)
            of_x = F.fold(patches, x.shape[2:], 3, padding=1, stride=ctx.stride)
        if ctx.needs_input_grad[1]:
            of_weight = product(grad, _patches(x, ctx.stride)).view_as(weight)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(1)
        return of_x, of_weight, of_bias, None


def _patches(x: Tensor, stride: int) -> Tensor:
    """x (B, C, H, W) -> (9 C, B H' W'): what the kernel covers at each pixel of the output."""
    return F.unfold(x, 3, padding=1, stride=stride).transpose(0, 1).flatten(1)
