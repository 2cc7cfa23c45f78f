"""The UNet's layers with their FLOPs and parameters, from the configuration and the shapes alone.

A multiply-add of a convolution, a linear layer or one of attention's two products counts as two FLOPs, as in
torch.utils.flop_counter. Norms, activations and additions are not counted (they move bytes and compute little). The
backward pass has one product for the gradient of the weights and one for that of the input; if the input is data (the
latent, the timestep, the context), the second is not computed. Attention's backward pass has four products; kernels
that recompute the scores compute a fifth, which is not counted.

memory.py has the memory that layers keep for the backward pass, and a step's peak memory. This module imports no torch,
so that a login node can plan a run: it repeats in arithmetic what models/unet/model.py builds, and tests compare the
two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from pipeline.config import ModelConfig
from pipeline.errors import ShapeError
from pipeline.planning.dimensions import depths_of, heads_of

Kind = Literal["conv", "linear", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer with weights, or attention's two products (which have none)."""

    name: str
    """Name of the module inside its block, such as res.conv1 or attention.blocks.0.attend_self.qkv."""
    kind: Kind
    """Kind of operation that computes it."""
    flops: int
    """FLOPs of the forward pass."""
    input_gradient: bool = True
    """Whether the backward pass computes the gradient of its input."""
    parameters: int = 0
    """Weights and biases."""

    @property
    def backward_flops(self) -> int:
        """FLOPs of the backward pass: for the gradients of weights and input, or for the two factors of each of
        attention's two products."""
        return self.flops * (1 + self.input_gradient)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One occurrence in the network of a row of the memory tables (memory.py), with the sizes that the tables refer
    to."""

    row: str
    """Row of the tables: embed, conv_in, res, project_in, self, cross, feed, project_out, pixel, down, up, res_down,
    res_up or out."""
    layers: tuple[Layer, ...]
    """Its layers in the order in which they run."""
    norms: int = 0
    """Parameters of its norms."""
    x: int = 0
    """Elements of its input: B H W in_width."""
    h: int = 0
    """Elements of its output: B H W width."""
    c: int = 0
    """Elements of the context at the piece's width: B L width."""
    rows: int = 0
    """Tokens: B H W."""
    heads: int = 0
    """Attention heads times tokens."""
    dropout: bool = False
    """Whether it has dropout."""
    scale_shift: bool = False
    """Whether the timestep scales and shifts its second norm."""

    @property
    def parameters(self) -> int:
        return self.norms + sum(layer.parameters for layer in self.layers)


@dataclass(frozen=True)
class Part:
    """A module of the network that runs as a whole: a block, which can be recomputed, or a module between blocks."""

    name: str  # as in UNet.named_modules(): encoder.0.blocks.1
    pieces: tuple[Piece, ...]
    block: bool = False

    @property
    def layers(self) -> list[Layer]:
        return [layer for piece in self.pieces for layer in piece.layers]

    @property
    def parameters(self) -> int:
        return sum(piece.parameters for piece in self.pieces)

    @property
    def recompute_flops(self) -> int:
        """FLOPs of recomputing what the block keeps: its forward pass without the last layer, whose output is not
        kept."""
        return sum(layer.flops for layer in self.layers[:-1])


@dataclass(frozen=True)
class Cost:
    """The cost of a UNet at one batch size and latent size."""

    parts: tuple[Part, ...]  # in the order in which they run
    inputs: int = 0
    """Elements of the network's inputs: the noisy latent and the context."""

    @cached_property
    def parameters(self) -> int:
        """Number of parameters: weights, biases and norms."""
        return sum(part.parameters for part in self.parts)

    def forward_flops(self) -> dict[Kind, int]:
        """FLOPs of one forward pass, by kind of operation."""
        return _by_kind((layer.kind, layer.flops) for part in self.parts for layer in part.layers)

    def training_flops(self, recomputed: Collection[str] = ()) -> dict[Kind, int]:
        """FLOPs of forward and backward pass, by kind of operation. recomputed: names of the blocks that the backward
        pass computes again."""
        recomputed_flops = [(layer.kind, layer.flops) for part in self.named(recomputed) for layer in part.layers[:-1]]
        step_flops = [
            (layer.kind, layer.flops + layer.backward_flops) for part in self.parts for layer in part.layers
        ]  # the optimizer's few FLOPs per parameter are left out
        return _by_kind(step_flops + recomputed_flops)

    def named(self, names: Collection[str]) -> list[Part]:
        """The blocks with these names, in the order in which they run."""
        blocks = [part for part in self.parts if part.block and part.name in names]
        assert len(blocks) == len(set(names)), f"blocks that the network does not have are among {sorted(names)}"
        return blocks


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
    stride = 2 ** (len(config.multipliers) - 1)
    if height % stride or width % stride:
        raise ShapeError(f"latents of {height}x{width}: height and width must be multiples of {stride}")
    walk = _Walk(config, batch, height * width, context_length, context_gradient)
    channels = in_channels or config.in_channels
    inputs = batch * (height * width * channels + context_length * config.context_width)
    return Cost(tuple(walk.network(channels)), inputs)


@dataclass(frozen=True)
class _Walk:
    """Goes through the network in the order in which it runs, with the sizes of one batch."""

    config: ModelConfig
    batch: int
    pixels: int  # pixels of a latent
    tokens: int  # tokens of a context
    context_gradient: bool

    def network(self, in_channels: int) -> Iterable[Part]:
        """All parts of the network, in order."""
        config = self.config
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        pixels = [self.pixels // 4**level for level in range(len(widths))]
        by_level = depths_of(config)
        depths = [depth if 2**level in config.attention else 0 for level, depth in enumerate(by_level)]

        yield self._embeddings()
        rows = self.batch * self.pixels
        conv = self._conv("conv_in", rows, 9, in_channels, widths[0], input_gradient=False)
        yield Part("conv_in", (Piece(row="conv_in", layers=(conv,), x=rows * in_channels, h=rows * widths[0]),))

        width, skips = widths[0], [widths[0]]
        for level, level_width in enumerate(widths):
            for i in range(config.blocks):
                yield self._block(f"encoder.{level}.blocks.{i}", pixels[level], width, level_width, depths[level])
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                yield Part(f"encoder.{level}.resample", (self._resample("down", pixels[level + 1], width),))
                skips.append(width)
        for i, depth in enumerate((by_level[-1], 0)):
            yield self._block(f"middle.{i}", pixels[-1], width, width, depth)
        for decoder_level, (level, level_width) in enumerate(reversed(list(enumerate(widths)))):
            for i in range(config.blocks + 1):
                in_width = width + skips.pop()
                yield self._block(
                    f"decoder.{decoder_level}.blocks.{i}", pixels[level], in_width, level_width, depths[level]
                )
                width = level_width
            if level > 0:
                yield Part(f"decoder.{decoder_level}.resample", (self._resample("up", pixels[level - 1], width),))

        rows = self.batch * self.pixels
        conv = self._conv("conv_out", rows, 9, width, config.out_channels)
        piece = Piece(row="out", layers=(conv,), norms=2 * width, x=rows * width, h=rows * config.out_channels)
        yield Part("conv_out", (piece,))

    def _embeddings(self) -> Part:
        """The embeddings of timestep and vector, one row per sample."""
        width, layers = 4 * self.config.channels, []
        for name, in_width in (("embed_timestep", self.config.channels), ("embed_vector", self.config.vector_width)):
            if in_width:
                layers.append(self._linear(f"{name}.linear1", self.batch, in_width, width, input_gradient=False))
                layers.append(self._linear(f"{name}.linear2", self.batch, width, width))
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
            self._linear(f"{prefix}embed", self.batch, 4 * config.channels, embedded),
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
        projections = [self._linear(f"attention.project_{end}", rows, width, width) for end in ("in", "out")]
        yield Piece(row="project_in", layers=(projections[0],), norms=2 * width, x=size, h=size)
        for i in range(depth):
            prefix = f"attention.blocks.{i}"
            yield self._self_attention("self", f"{prefix}.attend_self", pixels, width, bias=False)
            kv = self._linear(
                f"{prefix}.attend_cross.kv",
                self.batch * self.tokens,
                config.context_width,
                2 * width,
                bias=False,
                input_gradient=self.context_gradient,
            )
            cross = (
                self._linear(f"{prefix}.attend_cross.q", rows, width, width, bias=False),
                kv,
                self._attention(f"{prefix}.attend_cross", pixels, self.tokens, width),
                self._linear(f"{prefix}.attend_cross.out", rows, width, width),
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
                self._linear(f"{prefix}.feed.up", rows, width, 8 * width),
                self._linear(f"{prefix}.feed.down", rows, 4 * width, width),
            )
            yield Piece(row="feed", layers=feed, norms=2 * width, x=size, h=size, rows=rows)
        yield Piece(row="project_out", layers=(projections[1],), x=size, h=size)

    def _self_attention(self, row: str, name: str, pixels: int, width: int, bias: bool) -> Piece:
        rows = self.batch * pixels
        layers = (
            self._linear(f"{name}.qkv", rows, width, 3 * width, bias=bias),
            self._attention(name, pixels, pixels, width),
            self._linear(f"{name}.out", rows, width, width),
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
        return Layer(name=name, kind="attention", flops=4 * self.batch * queries * keys * width)

    @staticmethod
    def _conv(name: str, rows: int, taps: int, in_width: int, out_width: int, *, input_gradient: bool = True) -> Layer:
        weights = taps * in_width * out_width
        return Layer(
            name=name,
            kind="conv",
            flops=2 * rows * weights,
            parameters=weights + out_width,
            input_gradient=input_gradient,
        )

    @staticmethod
    def _linear(
        name: str, rows: int, in_width: int, out_width: int, *, bias: bool = True, input_gradient: bool = True
    ) -> Layer:
        weights = in_width * out_width
        return Layer(
            name=name,
            kind="linear",
            flops=2 * rows * weights,
            parameters=weights + bias * out_width,
            input_gradient=input_gradient,
        )


def _by_kind(flops_by_kind: Iterable[tuple[Kind, int]]) -> dict[Kind, int]:
    totals: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for kind, flops in flops_by_kind:
        totals[kind] += flops
    return totals
