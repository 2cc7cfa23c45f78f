"""Nearest-neighbour upsampling and a 3x3 convolution as one 2x2 convolution of the small image: the same function, with
4/9 of the operations except at the border.

Of the nine pixels under the kernel in the upsampled image only four differ, so the weights of equal pixels are summed:
along an axis, the pixel at an even index sees (x[i-1], x[i], x[i]), the one at an odd index (x[i], x[i], x[i+1]).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SUMS = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))
"""For even and odd indices: which of the three weights each of the two pixels sums."""


def fold(weight: Tensor) -> Tensor:
    """Weight of the 3x3 convolution (O, C, 3, 3) -> weight of the 2x2 one (4 O, C, 2, 2): O for each of the four
    pixels that an input pixel becomes."""
    sums = torch.tensor(SUMS, dtype=weight.dtype, device=weight.device)
    return torch.einsum("apk,bql,ockl->abocpq", sums, sums, weight).reshape(4 * len(weight), -1, 2, 2)


def unfold(y: Tensor) -> Tensor:
    """Output of the 2x2 convolution, padded by one (B, 4 O, H + 1, W + 1) -> (B, O, 2H, 2W), in the same layout."""
    batch, width, height, length = len(y), y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1
    if y.is_contiguous(memory_format=torch.channels_last):
        grid = y.permute(0, 2, 3, 1).view(batch, height + 1, length + 1, 2, 2, width)
        out = y.new_empty(batch, height, 2, length, 2, width)
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            out[:, :, a, :, b] = grid[:, a : a + height, b : b + length, a, b]
        return out.view(batch, 2 * height, 2 * length, width).permute(0, 3, 1, 2)
    planes = y.reshape(batch, 2, 2, width, height + 1, length + 1)
    out = y.new_empty(batch, width, height, 2, length, 2)
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        out[:, :, :, a, :, b] = planes[:, a, b, :, a : a + height, b : b + length]
    return out.view(batch, width, 2 * height, 2 * length)


class FoldedUpsample(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W) for frozen weights.

    It uses the 2x2 convolution in float32 on a CPU, and the two operations elsewhere (not measured there, and the sums
    of weights are rounded once more). conv: the 3x3 convolution, padded by one; its weight keeps its name, and is
    folded at the first call.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._folded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        if self._folded is None:
            self._folded = fold(conv.weight.detach()).contiguous(memory_format=torch.channels_last)
        bias = None if conv.bias is None else conv.bias.detach().repeat(4)
        return unfold(F.conv2d(x, self._folded, bias, padding=1))


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W), weight of a 3x3 convolution (O, C, 3, 3), bias (O,) -> (B, O, 2H, 2W), with gradients.

    The backward pass keeps x and the folded weight, and not the upsampled image, which has four times the pixels.
    """
    rows = (
        torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2),
        torch.stack([weight[:, :, 0] + weight[:, :, 1], weight[:, :, 2]], 2),
    )
    folded = [
        torch.stack(columns, 3)
        for row in rows
        for columns in (
            (row[..., 0], row[..., 1] + row[..., 2]),
            (row[..., 0] + row[..., 1], row[..., 2]),
        )
    ]
    y = F.conv2d(x, torch.cat(folded), None if bias is None else bias.repeat(4), padding=1)
    out: Tensor = _Unfold.apply(y)
    return out


class _Unfold(torch.autograd.Function):
    """`unfold`, whose gradient is where each pixel came from, and 0 for the pixels of the margin."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return unfold(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        batch, width, height, length = len(grad), grad.shape[1], grad.shape[2] // 2, grad.shape[3] // 2
        if grad.is_contiguous(memory_format=torch.channels_last) and not grad.is_contiguous():
            pixels = grad.permute(0, 2, 3, 1).view(batch, height, 2, length, 2, width)
            grid = grad.new_zeros(batch, height + 1, length + 1, 2, 2, width)
            for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                grid[:, a : a + height, b : b + length, a, b] = pixels[:, :, a, :, b]
            return grid.view(batch, height + 1, length + 1, 4 * width).permute(0, 3, 1, 2)
        pixels = grad.contiguous().view(batch, width, height, 2, length, 2)
        planes = grad.new_zeros(batch, 2, 2, width, height + 1, length + 1)
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            planes[:, a, b, :, a : a + height, b : b + length] = pixels[:, :, :, a, :, b]
        return planes.view(batch, 4 * width, height + 1, length + 1)
