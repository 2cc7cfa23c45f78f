"""Rows of pictures with a word before each and words above the columns, as one small PNG: pages of docs/ show it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, MARGIN, LINE, FONT_SIZE = 4, 8, 15, 12
"""Pixels between pictures, around all, of a line of text, and of its letters."""
WORDS = 84
"""Pixels before each row, for its word."""
COLOURS = 256
"""Of the file's palette, with which it is a third as large. They cover all colours first and are then moved to the
means of what they stand for: a palette of the most common ones leaves a small shape in the colour of another."""
PAPER, INK = (250, 250, 248), (36, 41, 47)


def sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], heads: Sequence[str] = (), scale: int = 2) -> bytes:
    """The bytes of a PNG. rows: a word and pictures (H, W, 3) uint8, all of one size, as many in each row. heads: words
    above the columns, or none. scale: whole factor of the pictures."""
    height, width = (side * scale for side in rows[0][1][0].shape[:2])
    font = ImageFont.load_default(FONT_SIZE)
    titles = [lines(head, font, width) for head in heads]
    top = MARGIN + max((len(title) for title in titles), default=0) * LINE
    columns = len(rows[0][1])
    size = (WORDS + columns * (width + GAP) + MARGIN, top + len(rows) * (height + GAP) + MARGIN)
    paper = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(paper)
    for column, title in enumerate(titles):
        for i, line in enumerate(title):
            left = WORDS + column * (width + GAP)
            draw.text((left, top - (len(title) - i) * LINE), line, fill=INK, font=font)
    for number, (word, pictures) in enumerate(rows):
        assert len(pictures) == columns, "rows of one length"
        y = top + number * (height + GAP)
        for i, line in enumerate(lines(word, font, WORDS - MARGIN)):
            draw.text((MARGIN, y + i * LINE), line, fill=INK, font=font)
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            paper.paste(tile, (WORDS + column * (width + GAP), y))
    file = io.BytesIO()
    few = paper.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True)
    return file.getvalue()


def lines(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Words in lines of at most `width` pixels; a word that is longer has a line of its own."""
    found: list[str] = []
    for word in words.split():
        if found and font.getlength(f"{found[-1]} {word}") <= width:
            found[-1] = f"{found[-1]} {word}"
        else:
            found.append(word)
    return found
