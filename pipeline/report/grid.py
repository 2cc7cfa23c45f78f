"""Pictures made of many samples: plain tiles, and rows of samples above their caption."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between tiles
MARGIN = 12  # pixels around a captioned grid and between its rows
LINE = 20  # pixels of height per caption line
FONT_SIZE = 14
MOST_LINES = 3  # of a caption
SMALLEST_TILE = 128  # captioned tiles are enlarged by a whole factor to at least this many pixels
PAPER, INK, FAINT = (250, 250, 248), (36, 41, 47), (226, 226, 222)


def tile(images: np.ndarray, columns: int) -> Image.Image:
    """Images (N, H, W, 3) uint8 in reading order, `columns` to a row, GAP pixels apart."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), FAINT)
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), ((i % columns) * (width + GAP), (i // columns) * (height + GAP)))
    return sheet


def captioned(
    images: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str],
    shown: Sequence[np.ndarray | None] | None = None,
) -> Image.Image:
    """Samples (K, H, W, 3) uint8 for each caption: one row per caption, above it. Rows may differ in H and W.

    Any text may be a caption: characters that the font lacks are drawn as its blank box, and long captions are wrapped
    and then cut. shown: for each row what was given, (H, W, 3) uint8 of the samples' size, or None: a picture before
    the row's first sample, with a wider gap behind it.
    """
    assert len(images) == len(captions), f"{len(images)} rows of images for {len(captions)} captions"
    given = list(shown) if shown is not None else [None] * len(images)
    before = [_before(row.shape[2]) if picture is not None else 0 for row, picture in zip(images, given, strict=True)]
    factors = [_factor(row.shape[2]) for row in images]
    sizes = [(row.shape[2] * factor, row.shape[1] * factor) for row, factor in zip(images, factors, strict=True)]
    widths = [
        len(row) * (width + GAP) - GAP + left for row, (width, _), left in zip(images, sizes, before, strict=True)
    ]
    inner = max(*widths, 2 * SMALLEST_TILE)
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrapped(caption, font, inner) for caption in captions]
    heights = [height + GAP + LINE * len(lines) + MARGIN for (_, height), lines in zip(sizes, texts, strict=True)]
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for i, (row, lines, size) in enumerate(zip(images, texts, sizes, strict=True)):
        places = [MARGIN + before[i] + k * (size[0] + GAP) for k in range(len(row))]
        pictures = list(zip(row, places, strict=True))
        if (picture := given[i]) is not None:
            pictures.append((picture, MARGIN))
        for picture, left in pictures:
            sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (left, top))
        for k, line in enumerate(lines):
            draw.text((MARGIN, top + size[1] + GAP + k * LINE), line, fill=INK, font=font)
        top += heights[i]
    return sheet


def captioned_size(count: int, sizes: Sequence[tuple[int, int]], *, shown: bool = False) -> tuple[int, int]:
    """(width, height) in pixels of what `captioned` makes, at most, of a row of `count` pictures of each size. shown:
    whether rows begin with what was given."""
    widths = [count * (width * _factor(width) + GAP) + shown * _before(width) for width, _ in sizes]
    heights = [height * _factor(width) + GAP + LINE * MOST_LINES + MARGIN for width, height in sizes]
    return max(*widths, 2 * SMALLEST_TILE) + 2 * MARGIN, sum(heights) + MARGIN


def _factor(width: int) -> int:
    """By which a tile of this width is enlarged."""
    return max(-(-SMALLEST_TILE // width), 1)


def _before(width: int) -> int:
    """Pixels that a picture of this width takes before a row, with the gap behind it."""
    return width * _factor(width) + MARGIN


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most MOST_LINES lines of at most `width` pixels, broken at blanks and, in longer words, anywhere."""
    lines, line = list[str](), ""
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        while word and len(lines) <= MOST_LINES:
            joined = f"{line} {word}".strip()
            if font.getlength(joined[:width]) <= width and len(joined) <= width:  # no character is under a pixel wide
                line, word = joined, ""
            elif line:
                lines.append(line)
                line = ""
            else:  # one word longer than a line
                length = 1
                while length < len(word) and font.getlength(word[: length + 1]) <= width:
                    length += 1
                lines.append(word[:length])
                word = word[length:]
    lines = [*lines, line] if line else lines
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1][:-1] + "…"]
