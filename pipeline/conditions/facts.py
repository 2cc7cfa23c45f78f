"""How the conditions of a cache were made: facts of its contract that a task and its evaluation rely on.

Each condition is an array of every record, `cond.NAME`. A condition with K > 1 variants has an axis of K before its
own shape: the sample number decides which one a training step sees (models/tasks/task.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.parsing.bounds import Real, Several, Text, Whole

MOST_CLASSES, MOST_BOX_CLASSES, MOST_LABELS = 1 << 20, 2048, 256
"""Classes of `class`; of boxes, which float16 holds exactly; of label maps, which are uint8."""
MOST_BOXES, MOST_VARIANTS = 4096, 64
Label = Annotated[str, Text(re.compile("[^\x00-\x1f\x7f-\x9f]+"), "a name in one line", 256)]
Names = tuple[Label, ...]
Variants = Annotated[int, Whole(1, MOST_VARIANTS)]
Kind = Literal["thin", "medium", "thick", "rectangles", "all", "file"]
"""Kinds of masks."""


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """cond.class, int32 (): a class from 0 to count - 1."""

    count: Annotated[int, Whole(1, MOST_CLASSES)]
    """Number of classes."""
    key: Annotated[
        str, Text(re.compile("cls|folder|unknown|json:[^\x00-\x1f\x7f-\x9f]+"), "cls, folder, json:KEY or unknown")
    ] = "cls"
    """Where it was read: cls (the .cls member, an ASCII integer), folder (the first of the key), json:KEY, or unknown,
    of a cache whose arrays other software wrote."""
    names: Names = ()
    """Names of the classes in order, or ()."""


@dataclass(frozen=True, kw_only=True)
class BoxFacts:
    """cond.boxes, float16 (most, 5): class, x0, y0, x1, y1 as fractions of the crop; -1 in rows without a box."""

    count: Annotated[int, Whole(1, MOST_BOX_CLASSES + 1)]
    """Number of classes; a box has one from 0 to count - 1."""
    most: Annotated[int, Whole(1, MOST_BOXES)]
    """Rows. Of a record with more boxes the largest are kept."""
    min_area: Annotated[float, Real(0, 1)] = 0.0
    """Smallest area of a box that is kept, as a share of the crop."""
    names: Names = ()
    """Names of the classes in order, or ()."""


@dataclass(frozen=True, kw_only=True)
class LabelFacts:
    """cond.labels, uint8 (grid h, grid w) for a latent of (h, w): a label map, sampled at the middle of each cell."""

    count: Annotated[int, Whole(1, MOST_LABELS)]
    """Number of labels; a cell has one from 0 to count - 1."""
    grid: Annotated[int, Whole(1, 4096)]
    """Cells per latent position, along a side."""
    offset: Annotated[int, Whole(0, 255)] = 0
    """What was added to the values of the label files, modulo 256."""
    names: Names = ()
    """Names of the labels in order, or ()."""


@dataclass(frozen=True, kw_only=True)
class LowresFacts:
    """cond.lowres, uint8 (3, H/factor, W/factor) for a crop of (H, W) pixels: the crop at a lower resolution."""

    factor: Annotated[int, Whole(2, 64)]
    """Pixels of the crop per pixel of the array, along a side."""
    degradation: Literal["box", "bicubic", "bsr", "file"]
    """box: means over blocks. bicubic: antialiased, clipped to 8 bits. bsr: the degradation of Rombach et al. 2021
    (appendix, "LDM-BSR"): blurs, resizes, noise and JPEG in a drawn order. file: the .lr.png of each sample."""
    variants: Variants = 1
    """Degradations stored of each record."""


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """cond.mask and cond.masked: a hole in the crop, and the latent of the crop without what is in it.

    cond.mask: uint8 (H, W), 1 inside the hole; with `packed`, (H, ceil(W / 8)), eight pixels to a byte, the first in
    the highest bit. cond.masked: float16 (C, h, w), the posterior mean of the crop with the hole filled, unscaled.
    """

    kinds: Annotated[tuple[Kind, ...], Several(1, 6, different=True)]
    """Kinds of masks, drawn with equal chances: LaMa's irregular strokes, rectangles, everything hidden, or the
    .mask.png of each sample."""
    variants: Variants = 1
    """Masks stored of each record."""
    packed: bool = True
    """Whether eight pixels share a byte."""
    hole: Literal["grey", "black"] = "grey"
    """Colour of the hole in the masked crop: grey is 0 in the range of -1 to 1, black is -1."""
    pooling: Literal["max", "nearest"] = "max"
    """How the mask becomes one value for each latent position: max (1 where any pixel is hidden), or nearest (the
    first pixel, as Stable Diffusion's)."""
    order: Literal["mask_masked", "masked_mask"] = "mask_masked"
    """Order of the channels after the latent's: mask then masked latent (Stable Diffusion), or the reverse (Rombach et
    al. 2021)."""
    low: Literal[-1, 0] = 0
    """Value of the mask's channel outside the hole; inside it is 1."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions of a cache; None where it does not hold one."""

    classes: ClassFacts | None = None
    """Of cond.class."""
    boxes: BoxFacts | None = None
    """Of cond.boxes."""
    labels: LabelFacts | None = None
    """Of cond.labels."""
    lowres: LowresFacts | None = None
    """Of cond.lowres."""
    mask: MaskFacts | None = None
    """Of cond.mask and cond.masked."""
    pixels: bool = False
    """Whether `pixels`, uint8 (3, H, W), holds the crop itself, with which evaluations compare."""
