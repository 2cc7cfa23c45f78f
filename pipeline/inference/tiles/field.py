"""How far positions reach through an autoencoder: which of them decide a pixel, and which pixels decide a latent.

Read off the networks' layers, as what convolutions can see; most of what they do see is nearer. Norms over a whole
picture and attention see everything, and are what tiles change (stage.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

Step = Literal["convolve", "double", "halve", "attend"]


def decoder_reach(model: Any, *, middle: bool) -> int | None:
    """Latent positions on either side of one that decide its pixels; None where a layer attends to all of them.

    model: an AutoencoderKL or VQModel of diffusers. middle: with the layers up to the middle block, or those alone that
    come after them.
    """
    steps = [*(_until_middle(model.decoder) if middle else ()), *_after_middle(model.decoder)]
    found = _reach(steps, 2 ** (len(model.config.block_out_channels) - 1))
    return None if found is None else max(found)


def encoder_reach(model: Any) -> int | None:
    """The same of the encoder's layers before its middle block, in pixels: those on either side of a latent position's
    own that decide what the middle block sees there."""
    steps: list[Step] = ["convolve"]
    for block in model.encoder.down_blocks:
        steps += _blocks(block)
        if block.downsamplers is not None:
            steps.append("halve")
    found = _reach(steps, 1)
    own = 2 ** (len(model.config.block_out_channels) - 1) - 1
    return None if found is None else max(found[0], found[1] - own)


def _until_middle(half: Any) -> Iterator[Step]:
    yield "convolve"
    yield from _blocks(half.mid_block)


def _after_middle(decoder: Any) -> Iterator[Step]:
    for block in decoder.up_blocks:
        yield from _blocks(block)
        if block.upsamplers is not None:
            yield "double"
            yield "convolve"
    yield "convolve"


def _blocks(block: Any) -> Iterator[Step]:
    """The residual blocks, of two convolutions each, and the attention of a level."""
    if any(attention is not None for attention in getattr(block, "attentions", None) or ()):
        yield "attend"
    for _ in block.resnets:
        yield "convolve"
        yield "convolve"


def _reach(steps: Iterable[Step], positions: int) -> tuple[int, int] | None:
    """How far before 0, and how far after it, inputs lie that decide outputs 0 to positions - 1 along an axis."""
    low, high = 0, positions - 1
    for step in reversed(list(steps)):
        if step == "attend":
            return None
        if step == "convolve":
            low, high = low - 1, high + 1
        elif step == "double":
            low, high = low // 2, high // 2
        else:  # a convolution of three positions, two apart, after a margin at the end
            low, high = 2 * low, 2 * high + 2
    return -low, high
