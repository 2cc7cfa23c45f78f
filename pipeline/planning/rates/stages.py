"""Costs of the networks beside the one that is trained: an autoencoder's halves, and towers of open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.config import FirstStageConfig
from pipeline.planning.cost import Cost, Layer, Part, Piece
from pipeline.planning.first_stage import autoencoder_cost
from pipeline.planning.inference import StageShape

ENCODER = ("model.encoder.", "model.quant_conv")
"""Beginnings of the names of the encoder's parts."""


def encoder_cost(shape: StageShape, batch: int, height: int, width: int) -> Cost:
    """Encoding pictures (batch, 3, height, width) by the encoder of a shape. Raises ShapeError."""
    return _half(shape, batch, height, width, encoder=True)


def decoder_cost(shape: StageShape, batch: int, height: int, width: int) -> Cost:
    """Decoding as many latents to pictures of height x width. Raises ShapeError."""
    return _half(shape, batch, height, width, encoder=False)


def _half(shape: StageShape, batch: int, height: int, width: int, *, encoder: bool) -> Cost:
    whole = autoencoder_cost(_config(shape), batch, height, width)
    parts = tuple(part for part in whole.parts if part.name.startswith(ENCODER) == encoder)
    return replace(whole, parts=parts)


def _config(shape: StageShape) -> FirstStageConfig:
    """The configuration whose layers have the sizes of a shape. Attention of the decoder's levels counts in both."""
    factors = tuple(2**level for level, attends in enumerate(shape.attention) if attends)
    return FirstStageConfig(
        channels=1,
        multipliers=shape.widths,
        blocks=shape.blocks,
        latent_channels=shape.latent_channels,
        attention=factors,
        middle_attention=shape.middle_attention,
    )


def text_cost(described: Mapping[str, Any], batch: int, tokens: int) -> Cost:
    """The states of so many captions of `tokens` tokens, by a text tower as open_clip describes it (text_cfg)."""
    text = described.get("text_cfg") or {}
    return tower_cost(int(text.get("layers", 12)), int(text.get("width", 512)), batch, tokens)


def image_cost(described: Mapping[str, Any], batch: int) -> Cost:
    """The embeddings of so many pictures by a tower's vision transformer as open_clip describes it (vision_cfg)."""
    vision = described.get("vision_cfg") or {}
    layers, width = vision.get("layers", 12), int(vision.get("width", 768))
    side, patch = int(vision.get("image_size", 224)), int(vision.get("patch_size", 16))
    count = layers if isinstance(layers, int) else 24  # a list is a ResNet's, of which none is much larger
    return tower_cost(count, width, batch, (side // patch) ** 2 + 1, patch=patch)


def tower_cost(layers: int, width: int, batch: int, tokens: int, patch: int = 0) -> Cost:
    """A transformer of `layers` blocks over sequences (batch, tokens, width), each of attention and two linear layers
    with four times the width between. patch: side of the pixels that a token is made of; 0 = tokens are looked up."""
    rows = batch * tokens
    size = rows * width
    parts: list[Part] = []
    if patch:
        parts.append(Part("patches", (Piece(row="conv_in", layers=(_linear("conv", rows, 3 * patch**2, width),)),)))
    for block in range(layers):
        products = Layer(
            name="products", kind="attention", flops=4 * batch * tokens**2 * width, inputs=tokens, outputs=width
        )
        attention = (_linear("qkv", rows, width, 3 * width), products, _linear("out", rows, width, width))
        mlp = (_linear("up", rows, width, 4 * width), _linear("down", rows, 4 * width, width))
        parts.append(
            Part(
                f"blocks.{block}",
                (
                    Piece(row="self", layers=attention, norms=2 * width, x=size, h=size, rows=rows),
                    Piece(row="feed", layers=mlp, norms=2 * width, x=size, h=size, rows=rows),
                ),
            )
        )
    return Cost(tuple(parts), size)


def _linear(name: str, rows: int, inputs: int, outputs: int) -> Layer:
    weights = inputs * outputs
    return Layer(
        name=name,
        kind="linear",
        flops=2 * rows * weights,
        parameters=weights + outputs,
        inputs=inputs,
        outputs=outputs,
    )
