"""The memory of networks that only predict: decoding and encoding by an autoencoder, denoising by the UNet.

Without gradients a tensor lives while a function that runs was given it or has it in a variable, so the peak is that of
a few tensors around one layer: a residual block's input, what the norm and the activation make of it, and so on. Sums
are of those tensors; scratch memory inside of kernels is not counted. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.config import ModelConfig
from pipeline.planning.cost import Part, Piece, unet_cost

FP32 = 4


@dataclass(frozen=True)
class StageShape:
    """What an AutoencoderKL or a VQModel of diffusers is made of. widths: channels by level, the pixels' first.
    attention: whether the decoder's blocks of a level attend, in the same order."""

    widths: tuple[int, ...]
    blocks: int
    latent_channels: int
    middle_attention: bool = True
    attention: tuple[bool, ...] = ()

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.widths) - 1)

    @property
    def parameters(self) -> int:
        """Number of its parameters, but for norms, biases and codebook."""
        widths, last = self.widths, self.widths[-1]
        count = 2 * (2 * _res_weights(last, last) + 4 * last**2 * self.middle_attention)
        count += 9 * (sum(width**2 for width in widths[:-1]) + sum(width**2 for width in widths[1:]))  # down and up
        for before, width in pairwise((widths[0], *widths)):
            count += _res_weights(before, width) + (self.blocks - 1) * _res_weights(width, width)
        for before, width in pairwise((last, *reversed(widths))):
            count += _res_weights(before, width) + self.blocks * _res_weights(width, width)
        return count


def stage_shape(config: Mapping[str, Any]) -> StageShape:
    """The shape of a network by its configuration, as diffusers writes it (config.json), with diffusers' defaults."""
    widths = tuple(config.get("block_out_channels", (64,)))
    ups = tuple(config.get("up_block_types", ("UpDecoderBlock2D",) * len(widths)))
    return StageShape(
        widths=widths,
        blocks=int(config.get("layers_per_block", 1)),
        latent_channels=int(config.get("vq_embed_dim") or config.get("latent_channels", 4)),
        middle_attention=bool(config.get("mid_block_add_attention", True)),
        attention=tuple("Attn" in str(kind) for kind in reversed(ups)),
    )


# --------------------------------------------------------------------------------------------------------------------
# Autoencoders


def decode_bytes(shape: StageShape, batch: int, height: int, width: int, element: int = FP32) -> int:
    """Most bytes of activations at once while latents (batch, C, height, width) are decoded whole. element: bytes of an
    activation."""
    rows = batch * height * width
    peak = _middle(shape, rows)
    peak = max(peak, *(_up(shape, batch, height, width)))
    return element * (peak + rows * shape.latent_channels) + 2 * FP32 * 3 * rows * shape.downsampling**2


def tile_bytes(
    shape: StageShape, height: int, width: int, side: int, batch: int = 1, tiles: int = 1, element: int = FP32
) -> int:
    """The same in tiles of `side` latent positions of `tiles` pictures at once, after a middle block that sees whole
    pictures: the pictures of the batch, what the middle block makes of `tiles` of them, and a tile's activations."""
    rows = tiles * height * width
    kept = element * rows * shape.widths[-1] + FP32 * 3 * batch * height * width * shape.downsampling**2
    tile = min(side, height), min(side, width)
    pixels = FP32 * 3 * 2 * tiles * tile[0] * tile[1] * shape.downsampling**2
    return max(element * _middle(shape, rows), kept + pixels + element * max(_up(shape, tiles, *tile)))


def encode_bytes(shape: StageShape, batch: int, height: int, width: int, element: int = FP32) -> int:
    """The same while pictures of height x width latent positions are encoded whole."""
    rows = batch * height * width * shape.downsampling**2
    peaks, before = [], shape.widths[0]
    for level, level_width in enumerate(shape.widths):
        taken, now = rows * before, before
        for i in range(shape.blocks):
            held = taken if i > 0 else 0
            peaks.append(held + _res(rows, now, level_width))
            now = level_width
        if level < len(shape.widths) - 1:
            peaks.append(taken + 2 * rows * now + rows // 4 * now)  # the image, with a margin of zeros, and the half
            rows //= 4
        before = level_width
    peaks.append(_middle(shape, rows))
    return element * max(peaks) + 2 * FP32 * 3 * batch * height * width * shape.downsampling**2


def _middle(shape: StageShape, rows: int) -> int:
    """Elements at the peak of a middle block. rows: positions."""
    width = shape.widths[-1]
    attention = _attention(rows, width) if shape.middle_attention else 0
    return rows * width + max(_res(rows, width, width), attention)


def _up(shape: StageShape, batch: int, height: int, width: int) -> list[int]:
    """Elements at the peaks of the decoder's layers after the middle block."""
    peaks = []
    now = shape.widths[-1]
    for level in reversed(range(len(shape.widths))):
        rows = batch * height * width
        taken, level_width = rows * now, shape.widths[level]  # a block's input lives until the block has ended
        for i in range(shape.blocks + 1):
            held = taken if i > 0 else 0
            peaks.append(held + _res(rows, now, level_width))
            now = level_width
            if level < len(shape.attention) and shape.attention[level]:
                peaks.append(taken + _attention(rows, now))
        if level > 0:
            # Folded: the image, four times its channels with a margin, and the large image.
            folded = 4 * batch * (height + 1) * (width + 1)
            peaks.append(taken + (rows + folded + 4 * rows) * now)
            height, width = 2 * height, 2 * width
    return peaks


def _res(rows: int, before: int, width: int) -> int:
    """A residual block without a timestep: its input, and what the norm and the activation made of it; at the end the
    branch, the shortcut, their sum, and that divided by 1."""
    x, h = rows * before, rows * width
    return max(3 * x, 2 * x + h, x + (4 if before != width else 3) * h)


def _attention(rows: int, width: int) -> int:
    """Attention of positions in one head, whose scores are never all in memory: input, norm, q, k, v, output, and its
    copy in another layout."""
    return 7 * rows * width


def _res_weights(before: int, width: int) -> int:
    return 9 * (before + width) * width + (before * width if before != width else 0)


# --------------------------------------------------------------------------------------------------------------------
# UNet


def denoise_bytes(
    config: ModelConfig, batch: int, height: int, width: int, tokens: int = 0, element: int = FP32
) -> int:
    """Most bytes of activations at once in a prediction for latents (batch, C, height, width). tokens: of the context.
    Weights are not in it. Raises ShapeError."""
    cost = unet_cost(config, batch, height, width, tokens)
    skips: list[int] = []  # outputs of the encoder that wait for the decoder
    peak = 0
    for part in cost.parts:
        x = part.pieces[0].x
        if part.block and part.name.startswith("decoder."):
            skip = skips.pop()
            peak = max(peak, sum(skips) + 2 * x)  # the image and the skip, and both joined
            peak = max(peak, sum(skips) + (x - skip) + _most(part))  # the image lives until the block has ended
        else:
            is_skip = part.name.startswith("encoder.") or part.name == "middle.0"  # its input
            peak = max(peak, sum(skips) - is_skip * x + _most(part))
        if part.name == "conv_in" or part.name.startswith("encoder."):
            skips.append(part.pieces[-1].h)
    return element * (cost.inputs + peak)


def _most(part: Part) -> int:
    """Elements at the peak of a part, with its input."""
    first, *others = part.pieces
    return max([_forward(first), *(first.x + _forward(piece) for piece in others)])


def _forward(piece: Piece) -> int:
    """Elements of the tensors at the peak of a piece (models/unet/layers.py)."""
    x, h = piece.x, piece.h
    if piece.row in ("res", "res_down", "res_up"):
        return max(2 * x + h, x + 4 * h)  # the sum of branch and skip; or the input, its norm and the branch
    if piece.row == "feed":
        return 15 * h  # tokens, their norm, values and gates of four widths each, their product
    if piece.row in ("self", "pixel"):
        return 9 * h  # tokens, their norm, q, k, v, the scaled q, attention's output, its copy, the projection
    if piece.row == "cross":
        return 7 * h + 2 * piece.c
    return x + 2 * h
