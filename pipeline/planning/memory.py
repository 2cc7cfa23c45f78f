"""The memory of training the UNet or a classifier: activations for the backward pass, weights, gradients, optimizer.

The two tables below are all that this module assumes of the layers (models/unet/layers.py): when a layer keeps more or
less, its row changes here, and tests say which one. Everything else is arithmetic over planning/cost.py. Imports no
torch.

The backward pass can compute blocks again instead of keeping their activations (Chen et al. 2016): `recompute` chooses
the blocks that free the most bytes per FLOP, until a budget is met.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.planning.cost import Cost, Part, Piece, Pool, classifier_cost, unet_cost

Precision = Literal["fp32", "bf16"]
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Bytes of an activation, by the precision of forward and backward passes."""
MASTER, MOMENTS, AVERAGE = 4, 8, 4
"""Bytes of a parameter's fp32 master weight, of Adam's two moments, and of the average (EMA)."""


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """How many tensors of each size. The sizes are those of a Piece; `rows` and `heads` are fp32, the others have the
    dtype of activations."""

    x: float = 0
    """Tensors as large as the input."""
    h: float = 0
    """Tensors as large as the output."""
    c: float = 0
    """Tensors of the context at the layer's width."""
    rows: float = 0
    """fp32 numbers per token."""
    heads: float = 0
    """fp32 numbers per token and head."""

    def bytes(self, piece: Piece, element: int) -> int:
        """Bytes of these tensors for one piece. element: bytes of an activation."""
        activations = self.x * piece.x + self.h * piece.h + self.c * piece.c
        return round(activations * element + (self.rows * piece.rows + self.heads * piece.heads) * 4)


KEPT: dict[str, Tensors] = {
    # Two linear layers on one row per sample: the features; the input and output of each SiLU.
    "embed": Tensors(x=1, h=4),
    "conv_in": Tensors(x=1),
    # For each convolution: the norm's input and its own; the norm's output is computed again (kernels/fused.py).
    "res": Tensors(x=2, h=2),
    # The norm's input and the projection's.
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
    # The upsampled image.
    "up": Tensors(h=1),
    # The norm's input and output, what is pooled of it; then as "res".
    "res_down": Tensors(x=2, h=3),
    "res_up": Tensors(x=1, h=3),
    # The norm's input and the convolution's.
    "out": Tensors(x=2),
    # A classifier's: the norm's input and output; k and v.
    "pool": Tensors(x=4),
    # The norm's input.
    "mean": Tensors(x=1),
    # An autoencoder's: the image with a further row and column of zeros.
    "pad_down": Tensors(x=1),
    # An autoencoder's: the small image, and the folded weight (both are its x).
    "folded_up": Tensors(x=1),
    # A discriminator's: the convolution's input (the activation overwrites the norm's output) and the norm's.
    "judge": Tensors(x=1, h=1),
    # Its first and last convolution, without a norm.
    "judge_end": Tensors(x=1),
    # A stage of a perceptual distance, in float32; planning/perceptual.py says of which tensors.
    "perceived": Tensors(rows=1),
    # A task's: two activations between three linear layers, the input and output of each.
    "perceptron": Tensors(x=4),
    # The norm's input and output; q, k, v and attention's output; a norm's mean and deviation, attention's log-sum.
    "encode_self": Tensors(x=2, h=4, rows=2, heads=1),
    # The norm's input and output; the activation's input and output, four widths each.
    "encode_feed": Tensors(x=2, h=2, rows=2),
    # Nothing runs, or nothing is kept.
    "none": Tensors(),
}
"""Tensors that each piece keeps for the backward pass; a tensor that two pieces keep is counted at the first."""
DROPOUT = Tensors(h=1)
"""Kept in addition by a residual block with dropout: the mask (a byte per element on a GPU)."""
SCALE_SHIFT = Tensors(h=2)
"""Kept in addition where the timestep scales and shifts the norm: the norm's output, and the input of its SiLU."""

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
    "res_down": Tensors(x=2, h=2),
    "res_up": Tensors(x=2, h=2),
    "out": Tensors(x=1),
    "pool": Tensors(x=3),
    "mean": Tensors(x=1),
    "pad_down": Tensors(x=2, h=1),
    "folded_up": Tensors(h=2),
    "judge": Tensors(x=1, h=2),
    "judge_end": Tensors(x=1, h=1),
    "perceived": Tensors(heads=3),
    "perceptron": Tensors(x=2),
    "encode_self": Tensors(x=3, h=4),
    "encode_feed": Tensors(x=3, h=2),
    "none": Tensors(),
}
"""Gradients and temporary tensors alive at once during a piece's backward pass, minus the kept tensors that it has
already freed."""


# --------------------------------------------------------------------------------------------------------------------
# Activations


def kept_bytes(cost: Cost, precision: Precision, recomputed: Collection[str] = ()) -> dict[str, int]:
    """Bytes that each part keeps between its forward and its backward pass, by name, and those of "inputs".

    recomputed: names of the blocks that keep only their inputs.
    """
    recomputed_names = {part.name for part in cost.named(recomputed)}
    kept = {
        part.name: _input_bytes(part, precision) if part.name in recomputed_names else _kept_whole(part, precision)
        for part in cost.parts
    }
    return {"inputs": cost.inputs * BYTES[precision]} | kept


def activation_bytes(cost: Cost, precision: Precision, recomputed: Collection[str] = ()) -> int:
    """Most bytes of kept activations at once: after the forward pass, or while a block is computed again."""
    kept = kept_bytes(cost, precision, recomputed)
    peak = total = kept.pop("inputs")
    for part in cost.parts:
        peak = max(peak, total + _kept_whole(part, precision))
        total += kept[part.name]
    return max(peak, total)


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
    """`recomputed_blocks` of the UNet."""
    cost = unet_cost(config, batch, height, width, context_length)
    return recomputed_blocks(cost, budget_bytes, precision, f"{batch} latents of {height}x{width}", config.name)


@lru_cache
def recompute_classifier(
    config: ModelConfig,
    classes: int,
    pool: Pool,
    batch: int,
    height: int,
    width: int,
    budget_bytes: int,
    precision: Precision = "bf16",
) -> tuple[str, ...]:
    """`recomputed_blocks` of a classifier."""
    cost = classifier_cost(config, classes, pool, batch, height, width)
    return recomputed_blocks(cost, budget_bytes, precision, f"{batch} latents of {height}x{width}", config.name)


def recomputed_blocks(cost: Cost, budget_bytes: int, precision: Precision, what: str, model: str) -> tuple[str, ...]:
    """The blocks to compute again so that activations fit the budget: names as in Network.named_modules(), in order.

    It takes the blocks that free the most bytes per recomputed FLOP first, then drops those that turn out not to be
    needed. what, model: the input and the network in the message. Raises ConfigError, which says how much is missing,
    when recomputing all blocks is not enough.
    """
    blocks = [part for part in cost.parts if part.block]
    block_names = [part.name for part in blocks]
    lowest_bytes = activation_bytes(cost, precision, block_names)
    if lowest_bytes > budget_bytes:
        raise ConfigError(
            f"activations of {what} need {lowest_bytes / 1e9:.3g} GB with every block of "
            f"model={model} recomputed: {(lowest_bytes - budget_bytes) / 1e9:.3g} GB more than the budget of "
            f"{budget_bytes / 1e9:.3g} GB; lower optim.micro_batch"
        )

    def gain(part: Part) -> float:
        return (_kept_whole(part, precision) - _input_bytes(part, precision)) / part.recompute_flops

    chosen: list[Part] = []
    candidates = sorted(blocks, key=gain, reverse=True)
    while activation_bytes(cost, precision, [part.name for part in chosen]) > budget_bytes:
        chosen.append(candidates.pop(0))
    for part in sorted(chosen, key=lambda part: part.recompute_flops, reverse=True):
        others = [other for other in chosen if other is not part]
        if activation_bytes(cost, precision, [other.name for other in others]) <= budget_bytes:
            chosen = others
    names = {part.name for part in chosen}
    return tuple(name for name in block_names if name in names)


def _kept_whole(part: Part, precision: Precision) -> int:
    """Bytes that a part keeps when it is not recomputed."""
    return sum(_kept_by_piece(piece, precision) for piece in part.pieces)


def _kept_by_piece(piece: Piece, precision: Precision) -> int:
    """Bytes that a piece keeps."""
    element = BYTES[precision]
    dropped = DROPOUT.bytes(piece, element) if piece.dropout else 0
    scaled = SCALE_SHIFT.bytes(piece, element) if piece.scale_shift else 0
    return KEPT[piece.row].bytes(piece, element) + dropped + scaled


def _input_bytes(part: Part, precision: Precision) -> int:
    """Bytes of a part's input."""
    return part.pieces[0].x * BYTES[precision]


# --------------------------------------------------------------------------------------------------------------------
# Weights, gradients, optimizer


@dataclass(frozen=True)
class State:
    """Bytes that one rank holds for the parameters."""

    weights: int  # as forward and backward passes use them; if ZeRO shards them, with those gathered in a step
    masters: int  # fp32 master weights, unless the weights themselves are fp32
    optimizer: int  # Adam's two moments
    average: int  # EMA
    gradients: int  # as the optimizer reads them, and buffers that the backward pass adds to them
    between_steps: int  # part of the gradients that stays between steps
    gathered: int  # part of the weights that exists only during a step

    @property
    def resident(self) -> int:
        """Bytes between steps."""
        return self.weights - self.gathered + self.masters + self.optimizer + self.average + self.between_steps

    @property
    def stepping(self) -> int:
        """Bytes while the optimizer steps."""
        return self.weights - self.gathered + self.masters + self.optimizer + self.average + self.gradients


def state_bytes(parameters: int, precision: Precision, stage: int, ranks: int = 1) -> State:
    """What a rank holds with AdamW in stage `stage` of DeepSpeed's ZeRO; stage 0 with one rank also describes
    engine=torch.

    DeepSpeed's communication buckets are not counted (at most a few times 4 x training.engines.base.BUCKET bytes), nor
    are similar buffers on a GPU. Raises ConfigError for bf16 in stage 0, which has no fp32 master weights.
    """
    if precision == "bf16" and stage == 0:
        raise ConfigError("precision=bf16 needs deepspeed.stage >= 1, which keeps fp32 master weights")
    share, element = -(-parameters // ranks), BYTES[precision]
    whole_gradients = {0: 4 * parameters, 1: (4 + 2) * parameters if precision == "bf16" else 4 * share}
    resident_gradients = {0: 0, 1: 4 * parameters if precision == "bf16" else 0, 2: 0, 3: 4 * share}
    return State(
        weights=element * (parameters + share if stage == 3 else parameters),
        masters=0 if stage == 0 else MASTER * share,
        optimizer=MOMENTS * (parameters if stage == 0 else share),
        average=AVERAGE * share,
        gradients=whole_gradients.get(stage, 4 * share),
        between_steps=resident_gradients[stage],
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
    """Most bytes of tensors at once in a training step of one rank, including the optimizer's step.

    Goes through the backward pass and sums what earlier parts keep, what the part keeps or computes again, its working
    tensors, the gradients of skips that wait for the encoder, and the gradients of weights so far. Memory inside
    libraries' kernels is not counted.

    cost: of a micro-batch. micro_batches: the number that gradients are accumulated over. average: whether the average
    (EMA) is counted.
    """
    state = state_bytes(cost.parameters, precision, stage, ranks)
    resident = state.resident + state.gathered - (0 if average else state.average)
    kept = kept_bytes(cost, precision, recomputed)
    element = BYTES[precision]
    new_gradients = state.gradients - state.between_steps  # bytes of gradients that the backward pass adds
    new_gradients_per_parameter = new_gradients / cost.parameters
    # With several micro-batches, the last one begins with all gradients.
    finished_gradients: float = new_gradients if micro_batches > 1 else 0
    skips = _skips(cost)
    earlier_kept = sum(kept.values())
    skip_gradients: dict[str, int] = {}  # gradients of skips, by the part of the encoder that made them
    peak = earlier_kept
    for part in reversed(cost.parts):
        earlier_kept -= kept[part.name]
        skip_gradients.pop(part.name, None)
        current = earlier_kept + _kept_whole(part, precision) + sum(skip_gradients.values()) + finished_gradients
        for piece in reversed(part.pieces):
            peak = max(peak, round(current + WORKING[piece.row].bytes(piece, element)))
            current -= _kept_by_piece(piece, precision)
        if micro_batches == 1:
            finished_gradients += new_gradients_per_parameter * part.parameters
        if part.name in skips:
            skip_gradients[skips[part.name]] = _input_bytes(part, precision)
    return resident + max(peak, new_gradients)


def _skips(cost: Cost) -> dict[str, str]:
    """For each block of the decoder, by name, the part whose output its skip brings; {} without a decoder."""
    sources = [p.name for p in cost.parts if p.name == "conv_in" or p.name.startswith("encoder.")]
    targets = [p.name for p in cost.parts if p.block and p.name.startswith("decoder.")]
    if not targets:
        return {}
    return dict(zip(targets, reversed(sources), strict=True))
