"""What the perceptual distance of a picture and its reconstruction costs (models/perceptual/network.py), by arithmetic.

Its weights are frozen and its arithmetic is float32: gradients pass through it to the reconstruction alone, and the
picture goes forward only. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pipeline.planning.cost import Layer, Part, Piece

Backbone = Literal["alex", "vgg", "lpips-vgg"]
"""The backbone of st-LPIPS, or LPIPS with VGG-16."""
BLUR = 3
"""Side of the blur that comes before every second pixel is taken."""
PAD = 2
"""Pixels by which an image is reflected beyond each edge before it is blurred."""

STAGES: dict[Backbone, tuple[tuple[int, tuple[int, ...], int, int, bool, int], ...]] = {
    "alex": (
        (0, (64,), 11, 2, True, 1),
        (3, (192,), 5, 2, False, 1),
        (3, (384,), 3, 1, False, 1),
        (0, (256,), 3, 1, False, 1),
        (0, (256,), 3, 1, False, 1),
    ),
    "vgg": (
        (0, (64, 64), 3, 1, False, 1),
        (2, (128, 128), 3, 1, False, 1),
        (2, (256, 256, 256), 3, 1, False, 1),
        (2, (512, 512, 512), 3, 1, False, 1),
        (2, (512, 512, 512), 3, 1, False, 1),
    ),
    "lpips-vgg": (
        (0, (64, 64), 3, 1, False, 1),
        (2, (128, 128), 3, 1, False, 2),
        (2, (256, 256, 256), 3, 1, False, 2),
        (2, (512, 512, 512), 3, 1, False, 2),
        (2, (512, 512, 512), 3, 1, False, 2),
    ),
}
"""Stages of a backbone as models/perceptual/network.py has them: window, widths, kernel, padding, blurs, step."""


class Passed(Layer):
    """A layer without gradients of its weights, for a picture and its reconstruction: both go forward, one backward.
    flops: of one picture forward."""

    @property
    def backward_flops(self) -> int:
        return self.flops // 2


def backbone_of(perceptual: str) -> Backbone | None:
    """The backbone that loss.perceptual names; that of a file or URL of st-LPIPS counts as VGG, the larger one."""
    if perceptual == "none":
        return None
    if perceptual.startswith("lpips-vgg"):
        return "lpips-vgg"
    return "alex" if perceptual.startswith("st-alex") else "vgg"


def weights_bytes(kind: Backbone) -> int:
    """Bytes of a distance's weights, which a rank holds beside those that are trained: convolutions, and a number for
    each channel of the features at a stage's end."""
    channels, numbers = 3, 0
    for _, widths, kernel, _, _, _ in STAGES[kind]:
        for out in widths:
            numbers += kernel**2 * channels * out + out
            channels = out
        numbers += channels
    return 4 * numbers


def distance_parts(kind: Backbone, batch: int, height: int, width: int) -> Iterator[Part]:
    """Stages of a distance between two batches of pictures (batch, 3, height, width)."""
    channels = 3
    for i, (window, widths, kernel, padding, blurs, step) in enumerate(STAGES[kind]):
        convolutions: list[tuple[int, int]] = []  # positions, products for each
        kept = 0
        if window:
            across = width
            height, width = ((side - window) // step + 1 for side in (height, width))
            rows_less = height * across  # the largest along columns of pixels, then along rows
            kept += (rows_less + (window - 2) * (rows_less + height * width)) * channels
            if step == 1:
                kept, height, width = _halved(kept, height, width, channels, convolutions)
        if i == 0 or window:
            kept += height * width * channels  # input of the first convolution
        for out in widths:
            height, width = (side + 2 * padding - kernel + 1 for side in (height, width))
            convolutions.append((height * width, kernel**2 * channels * out))
            channels = out
            if blurs:
                kept, height, width = _halved(kept, height, width, channels, convolutions)
            kept += height * width * channels  # what ReLU gave
        kept += height * width * channels  # difference of features
        flops = sum(2 * 2 * batch * positions * products for positions, products in convolutions)
        layer = Passed(name="convolutions", kind="conv", flops=flops)
        most = max(positions for positions, _ in convolutions) * channels
        yield Part(f"perceptual.{i}", (Piece(row="perceived", layers=(layer,), rows=batch * kept, heads=batch * most),))


def _halved(
    kept: int, height: int, width: int, channels: int, convolutions: list[tuple[int, int]]
) -> tuple[int, int, int]:
    """What is kept, and the sides, after a blur that takes every second pixel; adds its convolution."""
    kept += (height + 2 * PAD) * (width + 2 * PAD) * channels
    height, width = ((side + 2 * PAD - BLUR) // 2 + 1 for side in (height, width))
    convolutions.append((height * width, BLUR**2 * channels))
    return kept, height, width
