"""Pairs of a picture and its reconstruction, the worst first: as tiles for reports, and as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.report.grid import FAINT, FONT_SIZE, GAP, INK, LINE, MARGIN, PAPER, SMALLEST_TILE, png
from pipeline.runs.names import PAIRS
from pipeline.storage.base import Storage

MOST_SHOWN = 64
"""Pairs in the one picture."""
LONGEST = 60
"""Characters of a record's key that are written under it."""


@dataclass(frozen=True)
class Pair:
    """A picture, its reconstruction, both (H, W, 3) uint8, and how near they are. number: of the picture. key: of its
    record. psnr: in dB."""

    psnr: float
    number: int
    key: str
    picture: np.ndarray
    reconstruction: np.ndarray

    @property
    def words(self) -> str:
        """Which record it is, and how near."""
        return f"{self.key[:LONGEST]}: {self.psnr:.1f} dB"


def of_one_size(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) uint8 of any sizes as (K, H, W, 3): smaller ones on paper of the largest height and width."""
    if not pictures:
        return np.zeros((0, 1, 1, 3), np.uint8)
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    sheets = np.full((len(pictures), height, width, 3), FAINT, np.uint8)
    for sheet, picture in zip(sheets, pictures, strict=True):
        sheet[: picture.shape[0], : picture.shape[1]] = picture
    return sheets


def drawn(pairs: Sequence[Pair]) -> Image.Image:
    """One picture of pairs, in reading order: left the picture, right its reconstruction, below them record and PSNR.
    Small pictures are enlarged by a whole factor, their pixels as they are."""
    pairs = pairs[:MOST_SHOWN]
    tiles = [of_one_size([getattr(pair, name) for pair in pairs]) for name in ("picture", "reconstruction")]
    height, width = tiles[0].shape[1:3]
    factor = max(-(-SMALLEST_TILE // width), 1)
    height, width = height * factor, width * factor
    cell_width, cell_height = 2 * width + GAP + 2 * MARGIN, height + LINE + MARGIN
    columns = max(1, min(len(pairs), round(math.sqrt(len(pairs) * cell_height / cell_width))))
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for i, pair in enumerate(pairs):
        left, top = i % columns * cell_width + MARGIN, i // columns * cell_height + MARGIN
        for place, tile in enumerate(tiles):
            enlarged = Image.fromarray(tile[i]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + place * (width + GAP), top))
        words = "".join(character if character.isprintable() else " " for character in pair.words)
        draw.text((left, top + height + GAP), words, fill=INK, font=font)
    return sheet


def write_drawn(storage: Storage, prefix: str, pairs: Sequence[Pair]) -> None:
    """Store the picture of pairs as PREFIXpairs.png; nothing where there are none."""
    if pairs:
        storage.put(f"{prefix}{PAIRS}", png(drawn(pairs)))
