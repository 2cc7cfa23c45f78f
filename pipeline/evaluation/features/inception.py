"""Inception-v3 as FID defines it: the network of TensorFlow's inception-2015-12-05, under pytorch-fid's weight names.

It differs from torchvision's: average pools leave their padding out of the count (blocks 5b-5d, 6b-6e, 7b), the last
block pools by maxima, and there are 1,008 classes. The feature of FID (Heusel et al. 2017) is the mean over positions
after the last block; the Inception Score (Salimans et al. 2016) is of the class weights times it, without their bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CLASSES, SIDE = 2048, 1008, 299
EPSILON = 1e-3  # of every batch norm

Layer = tuple[str, int, int | tuple[int, int]]
"""A convolution: name, output channels, kernel (height, width); padded so that the size stays."""


class Convolution(nn.Module):
    """Convolution without bias, then batch norm and ReLU: (B, C, H, W) -> (B, D, H', W')."""

    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        height, across = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, across // 2) if padded else 0
        self.conv = nn.Conv2d(channels, width, (height, across), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches, whose outputs are concatenated in order, with a pooled branch last.

    branches: chains of layers. A list in place of the last layer splits the chain into parallel layers.
    pool: "average" or "max" over 3 x 3 at the same size, followed by a 1 x 1 convolution to pool_width channels; or
    "halve", in which branches end with stride 2, and so does a max pool that no convolution follows.
    """

    def __init__(
        self, channels: int, branches: Sequence[Sequence[Layer | list[Layer]]], pool: str, pool_width: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        self.width = pool_width or channels
        for branch in branches:
            width, chain = channels, list[list[str]]()
            for i, step in enumerate(branch):
                layers = step if isinstance(step, list) else [step]
                halves = pool == "halve" and i == len(branch) - 1
                for name, out, kernel in layers:
                    self.add_module(name, Convolution(width, out, kernel, 2 if halves else 1, not halves))
                chain.append([name for name, *_ in layers])
                width = sum(out for _, out, _ in layers)
            self.branches.append(chain)
            self.width += width
        if pool_width:
            self.branch_pool = Convolution(channels, pool_width, 1, 1, True)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.branches:
            y = x
            for names in chain:
                parts = [self.get_submodule(name)(y) for name in names]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        if self.pool == "halve":
            pooled = F.max_pool2d(x, 3, 2)
        elif self.pool == "max":
            pooled = self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        else:
            pooled = self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        return torch.cat([*outputs, pooled], 1)


def _block_35(channels: int, pool_width: int) -> Mixed:
    """At 35 x 35: 5b to 5d."""
    five: list[Layer] = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    three: list[Layer] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[("branch1x1", 64, 1)], five, three], "average", pool_width)


def _halve_35(channels: int) -> Mixed:
    """From 35 x 35 to 17 x 17: 6a."""
    three: list[Layer] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return Mixed(channels, [[("branch3x3", 384, 3)], three], "halve")


def _block_17(channels: int, width: int) -> Mixed:
    """At 17 x 17: 6b to 6e."""
    row, column = (1, 7), (7, 1)
    seven: list[Layer] = [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)]
    double: list[Layer] = [("branch7x7dbl_1", width, 1)]
    double += [("branch7x7dbl_2", width, column), ("branch7x7dbl_3", width, row)]
    double += [("branch7x7dbl_4", width, column), ("branch7x7dbl_5", 192, row)]
    return Mixed(channels, [[("branch1x1", 192, 1)], seven, double], "average", 192)


def _halve_17(channels: int) -> Mixed:
    """From 17 x 17 to 8 x 8: 7a."""
    three: list[Layer] = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)]
    seven: list[Layer] = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    return Mixed(channels, [three, [*seven, ("branch7x7x3_4", 192, 3)]], "halve")


def _block_8(channels: int, pool: str) -> Mixed:
    """At 8 x 8: 7b, and 7c, which alone pools by maxima."""
    three: list[Layer | list[Layer]] = [("branch3x3_1", 384, 1)]
    three.append([("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))])
    double: list[Layer | list[Layer]] = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    double.append([("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))])
    return Mixed(channels, [[("branch1x1", 320, 1)], three, double], pool, 192)


class Inception(nn.Module):
    """(B, 3, 299, 299) in about [-1, 1] -> features (B, 2048), averaged over the last block's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, 1, False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, 1, True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1, 1, True)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, 1, False)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = _halve_35(288)
        self.Mixed_6b = _block_17(768, 128)
        self.Mixed_6c = _block_17(768, 160)
        self.Mixed_6d = _block_17(768, 160)
        self.Mixed_6e = _block_17(768, 192)
        self.Mixed_7a = _halve_17(768)
        self.Mixed_7b = _block_8(1280, "average")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))

    @torch.no_grad()
    def randomize(self, seed: int) -> None:
        """Random weights under which activations keep their magnitude through all layers (He et al. 2015), for
        tests."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                statistics = (module.weight, module.bias, module.running_mean, module.running_var)
                for tensor, mean in zip(statistics, (1.0, 0.0, 0.0, 1.0), strict=True):
                    assert tensor is not None
                    tensor.uniform_(mean - 0.2, mean + 0.2, generator=generator)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, 2 / math.sqrt(WIDTH), generator=generator)
                module.bias.normal_(0, 1, generator=generator)
