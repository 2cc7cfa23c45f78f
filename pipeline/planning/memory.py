"""What training the UNet keeps in memory: activations for the backward pass, weights, gradients and optimizer.

The two tables below are all that is known of the layers (models/unet/layers.py): when a layer keeps more or less, its
row changes here, and tests say which. Everything else is arithmetic over planning/cost.py. Imports no torch.

Blocks can be computed again in the backward pass in place of being kept (Chen et al. 2016): `recompute` chooses those
that free the most bytes for a FLOP, until a budget holds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.planning.cost import Cost, Part, Piece, unet_cost

Precision = Literal["fp32", "bf16"]
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Of an activation, by the precision of forward and backward passes."""
MASTER, MOMENTS, AVERAGE = 4, 8, 4
"""Bytes of a parameter's fp32 master weight, of Adam's two moments, and of the average (EMA)."""


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Numbers of tensors by size. The sizes are those of a Piece; all but `rows` and `heads` are of activations."""

    x: float = 0
    """As large as the input."""
    h: float = 0
    """As large as the output."""
    c: float = 0
    """A context at the layer's width."""
    rows: float = 0
    """fp32 numbers a token."""
    heads: float = 0
    """fp32 numbers a token and head."""

    def bytes(self, piece: Piece, element: int) -> int:
        """Of these tensors in one place of the network."""
        activations = self.x * piece.x + self.h * piece.h + self.c * piece.c
        return round(activations * element + (self.rows * piece.rows + self.heads * piece.heads) * 4)


KEPT: dict[str, Tensors] = {
    # Two linear layers on a row a sample: features; the input and output of each SiLU.
    "embed": Tensors(x=1, h=4),
    "conv_in": Tensors(x=1),
    # In and out alike: the norm's input and the convolution's; what lies between is computed again (kernels/fused.py).
    "res": Tensors(x=2, h=2),
    # The norm's input, and that of the projection.
    "project_in": Tensors(x=1, h=1),
    # The norm's input and output, q, k and v, attention's output; a norm's mean and deviation, attention's log-sum.
    "self": Tensors(h=6, rows=2, heads=1),
    # The norm's input and output, q, attention's output; the context's k and v.
    "cross": Tensors(h=4, c=2, rows=2, heads=1),
    # The norm's input and output; values and gates (8), the product (4).
    "feed": Tensors(h=14, rows=2),
    "project_out": Tensors(x=1),
    # The norm's input and output, q, k and v, attention's output.
    "pixel": Tensors(h=6, heads=1),
    "down": Tensors(x=1),
    # The enlarged image.
    "up": Tensors(h=1),
    # The norm's input and the convolution's.
    "out": Tensors(x=2),
}
"""What each piece keeps for the backward pass; what two of them keep is counted at the first."""
DROPOUT = Tensors(h=1)
"""More, where a residual block drops activations: the mask (a byte each on a GPU)."""

WORKING: dict[str, Tensors] = {
    "embed": Tensors(h=2),
    "conv_in": Tensors(h=1),
    "res": Tensors(x=2, h=2),
    "project_in": Tensors(h=4),
    "self": Tensors(h=8),
    "cross": Tensors(h=5),
    "feed": Tensors(h=10),
    "project_out": Tensors(h=3),
    "pixel": Tensors(h=7),
    "down": Tensors(x=1, h=1),
    "up": Tensors(h=2),
    "out": Tensors(x=1),
}
"""Gradients and temporary tensors alive at once while a piece's backward pass runs, less what it has given back."""


# --------------------------------------------------------------------------------------------------------------------
# Activations


def kept_bytes(cost: Cost, precision: Precision, recomputed: Collection[str] = ()) -> dict[str, int]:
    """Bytes that each part keeps between its forward and its backward pass, by name, with the network's inputs.

    recomputed: the blocks that keep their inputs alone.
    """
    again = {part.name for part in cost.named(recomputed)}
    kept = {
        part.name: _entry(part, precision) if part.name in again else _whole(part, precision) for part in cost.parts
    }
    return {"inputs": cost.inputs * BYTES[precision]} | kept


def activation_bytes(cost: Cost, precision: Precision, recomputed: Collection[str] = ()) -> int:
    """Most bytes of kept activations at once: after the forward pass, or while a block is brought back."""
    kept = kept_bytes(cost, precision, recomputed)
    most = total = kept.pop("inputs")
    for part in cost.parts:
        most = max(most, total + _whole(part, precision))
        total += kept[part.name]
    return max(most, total)


@lru_cache
def recompute(
    config: ModelConfig,
    batch: int,
    height: int,
    width: int,
    context_length: int,
    budget_bytes: int,
    precision: Precision = "bf16",
) -> tuple[str, ...]:
    """The blocks to compute again so that activations fit the budget: names as in UNet.named_modules(), in order.

    Those that free the most bytes for a FLOP of recomputation are taken first, and what turns out not to be needed is
    given back. Raises ConfigError, which says by how much it misses, when recomputing every block does not suffice.
    """
    cost = unet_cost(config, batch, height, width, context_length)
    blocks = [part for part in cost.parts if part.block]
    every = [part.name for part in blocks]
    least = activation_bytes(cost, precision, every)
    if least > budget_bytes:
        raise ConfigError(
            f"activations of {batch} latents of {height}x{width} need {least / 1e9:.3g} GB with every block of "
            f"model={config.name} recomputed: {(least - budget_bytes) / 1e9:.3g} GB more than the budget of "
            f"{budget_bytes / 1e9:.3g} GB; lower optim.micro_batch"
        )

    def gain(part: Part) -> float:
        return (_whole(part, precision) - _entry(part, precision)) / part.recompute_flops

    chosen: list[Part] = []
    waiting = sorted(blocks, key=gain, reverse=True)
    while activation_bytes(cost, precision, [part.name for part in chosen]) > budget_bytes:
        chosen.append(waiting.pop(0))
    for part in sorted(chosen, key=lambda part: part.recompute_flops, reverse=True):
        others = [other for other in chosen if other is not part]
        if activation_bytes(cost, precision, [other.name for other in others]) <= budget_bytes:
            chosen = others
    names = {part.name for part in chosen}
    return tuple(name for name in every if name in names)


def _whole(part: Part, precision: Precision) -> int:
    """Bytes that a part keeps when nothing of it is recomputed."""
    return sum(_piece(piece, precision) for piece in part.pieces)


def _piece(piece: Piece, precision: Precision) -> int:
    dropped = DROPOUT.bytes(piece, BYTES[precision]) if piece.dropout else 0
    return KEPT[piece.row].bytes(piece, BYTES[precision]) + dropped


def _entry(part: Part, precision: Precision) -> int:
    """Bytes of a part's input."""
    return part.pieces[0].x * BYTES[precision]


# --------------------------------------------------------------------------------------------------------------------
# Weights, gradients, optimizer


@dataclass(frozen=True)
class State:
    """Bytes that one rank holds for the parameters."""

    weights: int  # what forward and backward passes use; where ZeRO cuts them, with those gathered in a step
    masters: int  # fp32, where they are not the weights
    optimizer: int  # Adam's two moments
    average: int  # EMA
    gradients: int  # as the optimizer takes them, with what is added to them in the backward pass
    between: int  # of the gradients, what stays between steps
    gathered: int  # of the weights, what is there in a step only

    @property
    def resident(self) -> int:
        """Between steps."""
        return self.weights - self.gathered + self.masters + self.optimizer + self.average + self.between

    @property
    def stepping(self) -> int:
        """When the optimizer steps."""
        return self.weights - self.gathered + self.masters + self.optimizer + self.average + self.gradients


def state_bytes(parameters: int, precision: Precision, stage: int, ranks: int = 1) -> State:
    """What a rank holds with AdamW under DeepSpeed's ZeRO `stage`; stage 0 in one rank is engine=torch, too.

    DeepSpeed's communication buckets are not counted (a few times 4 x training.engine.BUCKET bytes at most), nor are
    their likes on a GPU. Raises ConfigError for bf16 in stage 0, which has no fp32 master weights.
    """
    if precision == "bf16" and stage == 0:
        raise ConfigError("precision=bf16 needs deepspeed.stage >= 1, which keeps fp32 master weights")
    share, element = -(-parameters // ranks), BYTES[precision]
    whole_gradients = {0: 4 * parameters, 1: (4 + 2) * parameters if precision == "bf16" else 4 * share}
    stays = {0: 0, 1: 4 * parameters if precision == "bf16" else 0, 2: 0, 3: 4 * share}
    return State(
        weights=element * (parameters + share if stage == 3 else parameters),
        masters=0 if stage == 0 else MASTER * share,
        optimizer=MOMENTS * (parameters if stage == 0 else share),
        average=AVERAGE * share,
        gradients=whole_gradients.get(stage, 4 * share),
        between=stays[stage],
        gathered=element * parameters if stage == 3 else 0,
    )


# --------------------------------------------------------------------------------------------------------------------
# A step


def peak_bytes(
    cost: Cost,
    precision: Precision,
    *,
    stage: int = 0,
    ranks: int = 1,
    recomputed: Collection[str] = (),
    micro_batches: int = 1,
    average: bool = True,
) -> int:
    """Most bytes of tensors at once in a training step of one rank, the optimizer's part included.

    Walks through the backward pass: what earlier parts keep, what the part keeps or brings back, its working tensors,
    the gradients of the skips that the decoder has left, and the gradients of weights so far. What libraries use inside
    their kernels is not counted. cost: of a micro-batch. micro_batches: how many gradients are accumulated from.
    """
    state = state_bytes(cost.parameters, precision, stage, ranks)
    resident = state.resident + state.gathered - (0 if average else state.average)
    kept = kept_bytes(cost, precision, recomputed)
    element = BYTES[precision]
    fresh = state.gradients - state.between  # what the backward pass adds
    share = fresh / cost.parameters
    made: float = fresh if micro_batches > 1 else 0  # the last micro-batch begins with all of them
    skips = _skips(cost)
    before = sum(kept.values())
    waiting: dict[str, int] = {}  # gradients of what the encoder handed to the decoder
    most = before
    for part in reversed(cost.parts):
        before -= kept[part.name]
        waiting.pop(part.name, None)
        now = before + _whole(part, precision) + sum(waiting.values()) + made
        for piece in reversed(part.pieces):
            most = max(most, round(now + WORKING[piece.row].bytes(piece, element)))
            now -= _piece(piece, precision)
        if micro_batches == 1:
            made += share * part.parameters
        if part.name in skips:
            waiting[skips[part.name]] = _entry(part, precision)
    return resident + max(most, fresh)


def _skips(cost: Cost) -> dict[str, str]:
    """Each block of the decoder, and the part whose output it takes over its skip."""
    givers = [p.name for p in cost.parts if p.name == "conv_in" or p.name.startswith("encoder.")]
    takers = [p.name for p in cost.parts if p.block and p.name.startswith("decoder.")]
    return dict(zip(takers, reversed(givers), strict=True))
