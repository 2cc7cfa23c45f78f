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


def captioned(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Samples (K, H, W, 3) uint8 for each caption: one row per caption, above it. Rows may differ in H and W.

    Any text may be a caption: characters that the font lacks are drawn as its blank box, and long captions are wrapped
    and then cut.
    """
    assert len(images) == len(captions), f"{len(images)} rows of images for {len(captions)} captions"
    factors = [max(-(-SMALLEST_TILE // row.shape[2]), 1) for row in images]
    sizes = [(row.shape[2] * factor, row.shape[1] * factor) for row, factor in zip(images, factors, strict=True)]
    widths = [len(row) * (width + GAP) - GAP for row, (width, _) in zip(images, sizes, strict=True)]
    inner = max(*widths, 2 * SMALLEST_TILE)
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrapped(caption, font, inner) for caption in captions]
    heights = [height + GAP + LINE * len(lines) + MARGIN for (_, height), lines in zip(sizes, texts, strict=True)]
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, lines, (width, height), row_height in zip(images, texts, sizes, heights, strict=True):
        for k, image in enumerate(row):
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + k * (width + GAP), top))
        for i, line in enumerate(lines):
            draw.text((MARGIN, top + height + GAP + i * LINE), line, fill=INK, font=font)
        top += row_height
    return sheet


def captioned_size(count: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(width, height) in pixels of what `captioned` makes, at most, of a row of `count` pictures of each size."""
    factors = [max(-(-SMALLEST_TILE // width), 1) for width, _ in sizes]
    widths = [count * (width * factor + GAP) for (width, _), factor in zip(sizes, factors, strict=True)]
    heights = [
        height * factor + GAP + LINE * MOST_LINES + MARGIN for (_, height), factor in zip(sizes, factors, strict=True)
    ]
    return max(*widths, 2 * SMALLEST_TILE) + 2 * MARGIN, sum(heights) + MARGIN


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
