"""3x3 convolutions on a CPU: as matrix products for few pixels and a large weight, and by Winograd's tiles in compiled
networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.kernels import winograd
from pipeline.models.kernels.onednn import product

PIXELS = 256
"""Pixels of a batch's output up to which matrix products are faster: oneDNN reorders the weight at every call, which
takes longer than the convolution itself if there are few pixels."""
WEIGHTS = 2**20
"""in_channels x out_channels from which on matrix products are faster."""


class Conv3x3(nn.Conv2d):
    """(B, in_width, H, W) -> (B, width, ceil(H / stride), ceil(W / stride)), padded by one pixel of zeros.

    by_tiles: whether float32 convolutions of channels-last images on a CPU use models/kernels/winograd.py where it is
    faster.
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
        return self.by_tiles and self.stride[0] == 1 and self._runs_in_float32(x) and winograd.pays(x, self.weight)

    def _by_products(self, x: Tensor) -> bool:
        pixels = x.shape[0] * x.shape[2] * x.shape[3] // self.stride[0] ** 2
        pays = pixels <= PIXELS and self.in_channels * self.out_channels >= WEIGHTS
        return pays and self._runs_in_float32(x) and not torch.compiler.is_compiling()

    def _runs_in_float32(self, x: Tensor) -> bool:
        """Whether the convolution runs in float32 on a CPU, autocast considered."""
        float32 = x.dtype == self.weight.dtype == torch.float32
        return x.device.type == "cpu" and float32 and not torch.is_autocast_enabled("cpu")


class _Products(torch.autograd.Function):
    """A convolution as one product: the weight (width, 9 in_width) times all pixels' patches (9 in_width, B H W)."""

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
        x_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            patches = (weight.flatten(1).t() @ grad).view(weight[0].numel(), len(x), -1).transpose(0, 1)
            x_grad = F.fold(patches, x.shape[2:], 3, padding=1, stride=ctx.stride)
        if ctx.needs_input_grad[1]:
            weight_grad = product(grad, _patches(x, ctx.stride)).view_as(weight)
        if ctx.needs_input_grad[2]:
            bias_grad = grad.sum(1)
        return x_grad, weight_grad, bias_grad, None


def _patches(x: Tensor, stride: int) -> Tensor:
    """x (B, C, H, W) -> (9 C, B H' W'): the input values under the kernel at each output pixel."""
    return F.unfold(x, 3, padding=1, stride=stride).transpose(0, 1).flatten(1)
