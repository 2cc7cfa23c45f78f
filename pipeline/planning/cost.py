"""The layers of the UNet and of a classifier with their FLOPs and parameters, from configuration and shapes alone.

A multiply-add of a convolution, a linear layer or one of attention's two products counts as two FLOPs, as in
torch.utils.flop_counter. Norms, activations and additions are not counted (they move bytes and compute little). The
backward pass has one product for the gradient of the weights and one for that of the input; if the input is data (the
latent, the timestep, the context), the second is not computed. Attention's backward pass has four products; kernels
that recompute the scores compute a fifth, which is not counted.

memory.py has the memory that layers keep for the backward pass, and a step's peak memory. This module imports no torch,
so that a login node can plan a run: it repeats in arithmetic what models/unet/ and models/classifier.py build, and
tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.config import ModelConfig
from pipeline.errors import ShapeError
from pipeline.planning.dimensions import depths_of, heads_of
from pipeline.planning.parts import KINDS as KINDS
from pipeline.planning.parts import Cost as Cost
from pipeline.planning.parts import Kind as Kind
from pipeline.planning.parts import Layer as Layer
from pipeline.planning.parts import Part as Part
from pipeline.planning.parts import Piece as Piece
from pipeline.planning.parts import linear_layer

Pool = Literal["attention", "mean"]
"""How a classifier pools positions (config/tasks/kinds.py)."""


def unet_cost(
    config: ModelConfig,
    batch: int,
    height: int,
    width: int,
    context_length: int = 0,
    *,
    in_channels: int | None = None,
    context_gradient: bool = False,
) -> Cost:
    """The UNet of `config` on latents (batch, in_channels, height, width) and contexts of `context_length` tokens.

    in_channels: including channels that the task concatenates; None = config.in_channels. context_gradient: whether the
    context has a gradient. Raises ShapeError when height or width cannot be halved at every level.
    """
    require_stride(config, height, width)
    walk = Walk(config, batch, height * width, context_length, context_gradient)
    channels = in_channels or config.in_channels
    inputs = batch * (height * width * channels + context_length * config.context_width)
    return Cost((*walk.encoder(channels), *walk.decoder()), inputs)


def classifier_cost(config: ModelConfig, classes: int, pool: Pool, batch: int, height: int, width: int) -> Cost:
    """The classifier of `config` and of so many classes (models/classifier.py) on latents (batch, in_channels, height,
    width). Raises ShapeError when height or width cannot be halved at every level."""
    require_stride(config, height, width)
    walk = Walk(config, batch, height * width, 0, False)
    parts = (*walk.encoder(config.in_channels), walk.pooling(classes, pool))
    return Cost(parts, batch * height * width * config.in_channels)


def require_stride(config: ModelConfig, height: int, width: int) -> None:
    """Raise ShapeError when latents of this size cannot be halved at every level."""
    stride = 2 ** (len(config.multipliers) - 1)
    if height % stride or width % stride:
        raise ShapeError(f"latents of {height}x{width}: height and width must be multiples of {stride}")


@dataclass(frozen=True)
class Walk:
    """Goes through the network in the order in which it runs, with the sizes of one batch."""

    config: ModelConfig
    batch: int
    pixels: int  # pixels of a latent
    tokens: int  # tokens of a context
    context_gradient: bool

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """Pixels of an image, width, and transformer blocks of each level."""
        config = self.config
        return [
            (self.pixels // 4**level, config.channels * multiplier, depth if 2**level in config.attention else 0)
            for level, (multiplier, depth) in enumerate(zip(config.multipliers, depths_of(config), strict=True))
        ]

    def encoder(self, in_channels: int) -> Iterable[Part]:
        """The parts up to the middle blocks, in order."""
        config, levels = self.config, self.levels
        yield self._embeddings()
        rows, width = self.batch * self.pixels, levels[0][1]
        conv = self._conv("conv_in", rows, 9, in_channels, width, input_gradient=False)
        yield Part("conv_in", (Piece(row="conv_in", layers=(conv,), x=rows * in_channels, h=rows * width),))
        for level, (pixels, level_width, depth) in enumerate(levels):
            for i in range(config.blocks):
                yield self._block(f"encoder.{level}.blocks.{i}", pixels, width, level_width, depth)
                width = level_width
            if level < len(levels) - 1:
                yield Part(f"encoder.{level}.resample", (self._resample("down", pixels // 4, width),))
        for i, depth in enumerate((depths_of(config)[-1], 0)):
            yield self._block(f"middle.{i}", levels[-1][0], width, width, depth)

    def decoder(self) -> Iterable[Part]:
        """The parts after the middle blocks, in order."""
        config, levels = self.config, self.levels
        skips = [levels[0][1]]
        for level, (_, level_width, _) in enumerate(levels):
            skips += [level_width] * (config.blocks + (level < len(levels) - 1))
        width = levels[-1][1]
        for decoder_level, (level, (pixels, level_width, depth)) in enumerate(reversed(list(enumerate(levels)))):
            for i in range(config.blocks + 1):
                in_width = width + skips.pop()
                yield self._block(f"decoder.{decoder_level}.blocks.{i}", pixels, in_width, level_width, depth)
                width = level_width
            if level > 0:
                yield Part(f"decoder.{decoder_level}.resample", (self._resample("up", pixels * 4, width),))
        rows = self.batch * self.pixels
        conv = self._conv("conv_out", rows, 9, width, config.out_channels)
        piece = Piece(row="out", layers=(conv,), norms=2 * width, x=rows * width, h=rows * config.out_channels)
        yield Part("conv_out", (piece,))

    def pooling(self, classes: int, pool: Pool) -> Part:
        """What a classifier makes of the middle blocks' output: logits of so many classes."""
        pixels, width, _ = self.levels[-1]
        out = linear_layer("pool.out", self.batch, width, classes)
        rows = self.batch * pixels
        if pool == "mean":
            return Part("pool", (Piece(row="mean", layers=(out,), norms=2 * width, x=rows * width),))
        layers = (
            linear_layer("pool.kv", rows, width, 2 * width),
            linear_layer("pool.q", self.batch, width, width),
            self._attention("pool", 1, pixels, width),
            out,
        )
        return Part("pool", (Piece(row="pool", layers=layers, norms=2 * width, x=rows * width),))

    def _embeddings(self) -> Part:
        """The embeddings of timestep and vector, one row per sample."""
        width, layers = 4 * self.config.channels, []
        for name, in_width in (("embed_timestep", self.config.channels), ("embed_vector", self.config.vector_width)):
            if in_width:
                layers.append(linear_layer(f"{name}.linear1", self.batch, in_width, width, input_gradient=False))
                layers.append(linear_layer(f"{name}.linear2", self.batch, width, width))
        embedders = len(layers) // 2
        sizes = self.batch * (self.config.channels + self.config.vector_width), embedders * self.batch * width
        return Part("embed", (Piece(row="embed", layers=tuple(layers), x=sizes[0], h=sizes[1]),))

    def _block(self, name: str, pixels: int, in_width: int, width: int, depth: int) -> Part:
        """A residual block, and its attention if depth > 0. pixels: of an image at its level."""
        res = self._res("res", "res.", pixels, in_width, width)
        if not depth:
            return Part(name, (res,), block=True)
        if not self.config.context_width:
            attention = self._self_attention("pixel", "attention.attend", pixels, width, bias=True)
            return Part(name, (res, attention), block=True)
        return Part(name, (res, *self._transformer(pixels, width, depth)), block=True)

    def _res(self, row: str, prefix: str, pixels: int, in_width: int, width: int, x: int = 0) -> Piece:
        """A residual block whose convolutions see `pixels` of an image. x: elements of its input; 0 = at those."""
        config, rows = self.config, self.batch * pixels
        embedded = 2 * width if config.scale_shift_norm else width
        layers = [
            self._conv(f"{prefix}conv1", rows, 9, in_width, width),
            linear_layer(f"{prefix}embed", self.batch, 4 * config.channels, embedded),
            self._conv(f"{prefix}conv2", rows, 9, width, width),
        ]
        if in_width != width:
            layers.append(self._conv(f"{prefix}skip", rows, 1, in_width, width))
        return Piece(
            row=row,
            layers=tuple(layers),
            norms=2 * (in_width + width),
            x=x or rows * in_width,
            h=rows * width,
            dropout=config.dropout > 0,
            scale_shift=config.scale_shift_norm,
        )

    def _resample(self, way: Literal["down", "up"], pixels: int, width: int) -> Piece:
        """What halves or doubles the resolution. pixels: of its output."""
        rows = self.batch * pixels
        x = 4 * rows * width if way == "down" else rows * width // 4
        if self.config.resblock_updown:
            return self._res(f"res_{way}", "", pixels, width, width, x)
        return Piece(row=way, layers=(self._conv("conv", rows, 9, width, width),), x=x, h=rows * width)

    def _transformer(self, pixels: int, width: int, depth: int) -> Iterable[Piece]:
        config, rows, size = self.config, self.batch * pixels, self.batch * pixels * width
        projections = [linear_layer(f"attention.project_{end}", rows, width, width) for end in ("in", "out")]
        yield Piece(row="project_in", layers=(projections[0],), norms=2 * width, x=size, h=size)
        for i in range(depth):
            prefix = f"attention.blocks.{i}"
            yield self._self_attention("self", f"{prefix}.attend_self", pixels, width, bias=False)
            kv = linear_layer(
                f"{prefix}.attend_cross.kv",
                self.batch * self.tokens,
                config.context_width,
                2 * width,
                bias=False,
                input_gradient=self.context_gradient,
            )
            cross = (
                linear_layer(f"{prefix}.attend_cross.q", rows, width, width, bias=False),
                kv,
                self._attention(f"{prefix}.attend_cross", pixels, self.tokens, width),
                linear_layer(f"{prefix}.attend_cross.out", rows, width, width),
            )
            yield Piece(
                row="cross",
                layers=cross,
                norms=2 * width,
                x=size,
                h=size,
                c=self.batch * self.tokens * width,
                rows=rows,
                heads=rows * heads_of(config, width),
            )
            feed = (
                linear_layer(f"{prefix}.feed.up", rows, width, 8 * width),
                linear_layer(f"{prefix}.feed.down", rows, 4 * width, width),
            )
            yield Piece(row="feed", layers=feed, norms=2 * width, x=size, h=size, rows=rows)
        yield Piece(row="project_out", layers=(projections[1],), x=size, h=size)

    def _self_attention(self, row: str, name: str, pixels: int, width: int, bias: bool) -> Piece:
        rows = self.batch * pixels
        layers = (
            linear_layer(f"{name}.qkv", rows, width, 3 * width, bias=bias),
            self._attention(name, pixels, pixels, width),
            linear_layer(f"{name}.out", rows, width, width),
        )
        size = rows * width
        return Piece(
            row=row,
            layers=layers,
            norms=2 * width,
            x=size,
            h=size,
            rows=rows,
            heads=rows * heads_of(self.config, width),
        )

    def _attention(self, name: str, queries: int, keys: int, width: int) -> Layer:
        flops = 4 * self.batch * queries * keys * width
        return Layer(name=name, kind="attention", flops=flops, inputs=keys, outputs=width)

    @staticmethod
    def _conv(name: str, rows: int, taps: int, in_width: int, out_width: int, *, input_gradient: bool = True) -> Layer:
        weights = taps * in_width * out_width
        return Layer(
            name=name,
            kind="conv",
            flops=2 * rows * weights,
            parameters=weights + out_width,
            input_gradient=input_gradient,
            inputs=taps * in_width,
            outputs=out_width,
        )
