"""How `latentmill encode` makes the conditions of a cache: a group of keys for each. Part of the contract.

What each array holds is in pipeline/conditions/facts.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.conditions.facts import Kind
from pipeline.config.values.bounds import Between


@dataclass(frozen=True, kw_only=True)
class ClassesConfig:
    """Where the class of each image is read, for conditions=[class]."""

    key: str = "cls"
    """Where a sample's class is: cls (the .cls member, a whole number in ASCII), json:KEY (a key of the .json
    member) or folder (the first folder of its name: cat/001.jpg is a cat)."""
    count: Annotated[int, Between(0, 1 << 20)] = 0
    """Number of classes; a sample has one from 0 to count - 1. 0 = the number of names."""
    names: str = ""
    """File of the classes' names in order, local, s3://, gs:// or az://: .txt (a name in each line) or .json (a list,
    or {"0": name}); "" = no names, and with key=folder those of the folders in `source`, sorted."""


@dataclass(frozen=True, kw_only=True)
class BoxesConfig:
    """Which boxes of each image are stored, for conditions=[boxes]."""

    most: Annotated[int, Between(1, 4096)] = 30
    """Boxes stored of an image. Of an image with more, the largest are stored, and the others are counted in the
    report of their shard and on the dataset's page."""
    min_area: Annotated[float, Between(0, 1)] = 0.0
    """Smallest area of a box, clipped by the crop, as a share of the crop; smaller boxes are left out and counted."""
    count: Annotated[int, Between(0, 2049)] = 0
    """Number of classes; a box has one from 0 to count - 1. 0 = the number of names."""
    names: str = ""
    """File of the classes' names in order, as in classes.names; "" = no names."""


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """How label maps are read and stored, for conditions=[labels]."""

    count: Annotated[int, Between(0, 256)] = 0
    """Number of labels; after `offset` is added, a pixel has one from 0 to count - 1. 0 = the number of names."""
    offset: Annotated[int, Between(0, 255)] = 0
    """What is added to each value of a file, modulo 256: with 1, the 255 of unlabelled pixels becomes 0."""
    grid: Annotated[int, Between(1, 4096)] = 4
    """Cells stored per latent position along a side, each with the label at its middle. The autoencoder's downsampling
    factor stores every pixel."""
    names: str = ""
    """File of the labels' names in order, as in classes.names; "" = no names."""


@dataclass(frozen=True, kw_only=True)
class LowresConfig:
    """How the small image is made, for conditions=[lowres]."""

    factor: Annotated[int, Between(2, 64)] = 4
    """Pixels of the crop per pixel of the small image, along a side."""
    degradation: Literal["bicubic", "box", "bsr", "file"] = "bicubic"
    """bicubic: antialiased, clipped and rounded to 8 bits. box: means over blocks. bsr: blurs, resizes, noise and JPEG
    in a drawn order (Rombach et al. 2021, "LDM-BSR"). file: the .lr.png member of the sample."""
    variants: Annotated[int, Between(1, 64)] = 1
    """Small images stored of each crop, drawn anew each (bsr); a training step sees one of them."""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How the hole is made, for conditions=[mask]."""

    kinds: tuple[Kind, ...] = ("thin", "medium", "thick", "rectangles")
    """Kinds of holes, drawn with equal chances. thin, medium, thick: irregular strokes and boxes as LaMa is trained
    with (Suvorov et al. 2022), at the crop's size. rectangles: one rectangle, its sides between a quarter and three
    quarters of the crop's. all: the whole crop, as Stable Diffusion's inpainting sees in a quarter of its samples
    ([thin,medium,thick,all]). file: the .mask.png member of the sample (white is the hole)."""
    variants: Annotated[int, Between(1, 64)] = 1
    """Holes stored of each crop, drawn anew each; a training step sees one of them."""
    convention: Literal["own", "stable_diffusion", "ldm"] = "own"
    """What the model is given. own: the mask's maximum over a latent position, 0 or 1, then the latent of the image
    with a grey hole. stable_diffusion: the same, with the mask's first pixel of each latent position. ldm: the latent
    of the image with a black hole, then the mask's first pixel, -1 or 1 (Rombach et al. 2021)."""
