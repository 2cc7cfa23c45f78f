"""Group norms whose mean and deviation are those of a whole picture, while they see a part of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.inference.tiles.windows import Window

ROWS = 64
"""Rows that are normalized at once in less than float32."""


class TileNorm(nn.GroupNorm):
    """A GroupNorm, to the bit, until it is told what to take as mean and deviation."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.statistics: tuple[Tensor, Tensor] | None = None
        """Mean, and 1 / deviation, of every image and group: (B, G) float32."""
        self.seen: Window | None = None
        """The window that the next input is of: moments of its core are added to `sums`."""
        self.sums: Tensor | None = None
        """(3, B, G) float64: how many values, their sum and that of their squares."""

    def forward(self, input: Tensor) -> Tensor:
        if self.seen is not None:
            self._add(input, self.seen)
        if self.statistics is None:
            return super().forward(input)
        mean, scale = (each.repeat_interleave(self.num_channels // self.num_groups, 1) for each in self.statistics)
        scale = scale * self.weight.float()
        shift = self.bias.float() - mean * scale
        shape = (*scale.shape, *[1] * (input.ndim - 2))
        scale, shift = scale.view(shape), shift.view(shape)
        if input.dtype == torch.float32:
            return torch.addcmul(shift, input, scale)
        parts = input.split(ROWS, 2)  # so that no float32 copy is in memory as a whole
        return torch.cat([torch.addcmul(shift, part.float(), scale).to(input.dtype) for part in parts], 2)

    def _add(self, x: Tensor, window: Window) -> None:
        """Add the moments of x (B, C, h, w), or of positions in a row (B, C, h w)."""
        if x.ndim == 3:
            factor = math.isqrt(x.shape[2] // (window.height * window.width))
            x = x.unflatten(2, (window.height * factor, window.width * factor))
        factor = x.shape[2] // window.height
        top, left, bottom, right = (edge * factor for edge in window.core)
        core = x[:, :, top:bottom, left:right].float()
        variance, mean = (each.double() for each in torch.var_mean(core, dim=(2, 3), correction=0))
        count = torch.full_like(mean, core.shape[2] * core.shape[3])
        sums = torch.stack([count, count * mean, count * (variance + mean**2)])
        sums = sums.unflatten(2, (self.num_groups, -1)).sum(3)
        self.sums = sums if self.sums is None else self.sums + sums


class WholeStatistics:
    """The norms of a network, which take the statistics of a whole picture together."""

    def __init__(self, network: nn.Module) -> None:
        """Puts a TileNorm in the place of every GroupNorm below `network`; names and weights stay."""
        for name, norm in list(network.named_modules()):
            if type(norm) is nn.GroupNorm:
                network.set_submodule(name, TileNorm(norm))
        self.norms: Sequence[TileNorm] = [norm for norm in network.modules() if isinstance(norm, TileNorm)]

    @contextmanager
    def gathered_from(self, window: Window) -> Iterator[None]:
        """Inside of the context the network sees this window, whose core counts."""
        for norm in self.norms:
            norm.seen = window
        try:
            yield
        finally:
            for norm in self.norms:
                norm.seen = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside of the context norms take what was gathered, which is forgotten afterwards. Those that were not run
        go on as they are."""
        for norm in self.norms:
            if norm.sums is not None:
                count, total, squares = norm.sums
                mean = total / count
                variance = (squares / count - mean**2).clamp(min=0)
                norm.statistics = mean.float(), (variance + norm.eps).rsqrt().float()
        try:
            yield
        finally:
            for norm in self.norms:
                norm.statistics = norm.sums = None
