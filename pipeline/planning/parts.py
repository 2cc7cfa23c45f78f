"""What a network's cost is made of: its parts, their pieces, and the layers of these. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

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
    inputs: int = 0
    """Numbers that each number of the output is a sum over: channels times positions of the kernel; of attention, the
    keys of a query. 0 = not said."""
    outputs: int = 0
    """Channels of the output; of attention, the channels of all heads. 0 = not said."""

    @property
    def rows(self) -> int:
        """Positions of the output in the batch; 0 where its sizes are not said."""
        products = self.inputs * self.outputs * (2 if self.kind == "attention" else 1)
        return self.flops // (2 * products) if products else 0

    @property
    def backward_flops(self) -> int:
        """FLOPs of the backward pass: for the gradients of weights and input, or for the two factors of each of
        attention's two products."""
        return self.flops * (1 + self.input_gradient)


def linear_layer(
    name: str, rows: int, in_width: int, out_width: int, *, bias: bool = True, input_gradient: bool = True
) -> Layer:
    """A linear layer. rows: positions of its output in the batch."""
    weights = in_width * out_width
    return Layer(
        name=name,
        kind="linear",
        flops=2 * rows * weights,
        parameters=weights + bias * out_width,
        input_gradient=input_gradient,
        inputs=in_width,
        outputs=out_width,
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One occurrence in the network of a row of the memory tables (memory.py), with the sizes that the tables refer
    to."""

    row: str
    """Row of the tables (KEPT and WORKING of memory.py)."""
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
    """The cost of a network at one batch size and latent size."""

    parts: tuple[Part, ...]  # in the order in which they run
    inputs: int = 0
    """Elements of the network's inputs: the noisy latent and the context."""

    @cached_property
    def parameters(self) -> int:
        """Number of parameters: weights, biases and norms."""
        return sum(part.parameters for part in self.parts)

    def forward_flops(self) -> dict[Kind, int]:
        """FLOPs of one forward pass, by kind of operation."""
        return by_kind((layer.kind, layer.flops) for part in self.parts for layer in part.layers)

    def training_flops(self, recomputed: Collection[str] = ()) -> dict[Kind, int]:
        """FLOPs of forward and backward pass, by kind of operation. recomputed: names of the blocks that the backward
        pass computes again."""
        recomputed_flops = [(layer.kind, layer.flops) for part in self.named(recomputed) for layer in part.layers[:-1]]
        step_flops = [
            (layer.kind, layer.flops + layer.backward_flops) for part in self.parts for layer in part.layers
        ]  # the optimizer's few FLOPs per parameter are left out
        return by_kind(step_flops + recomputed_flops)

    def named(self, names: Collection[str]) -> list[Part]:
        """The blocks with these names, in the order in which they run."""
        blocks = [part for part in self.parts if part.block and part.name in names]
        assert len(blocks) == len(set(names)), f"blocks that the network does not have are among {sorted(names)}"
        return blocks


def by_kind(flops_by_kind: Iterable[tuple[Kind, int]]) -> dict[Kind, int]:
    """The sum of FLOPs of each kind of operation."""
    totals: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for kind, flops in flops_by_kind:
        totals[kind] += flops
    return totals
