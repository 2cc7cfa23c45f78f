"""cond.labels: a label map, sampled at the middle of each cell. Labels are never mixed."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.conditions.facts import LabelFacts
from pipeline.conditions.png import read_png
from pipeline.errors import RecordRejected

MODES = ("1", "L", "P")
REFUSED = {"I;16": "16-bit grey", "I;16B": "16-bit grey", "I": "16-bit grey", "RGB": "colours", "RGBA": "colours"}


def label_map(image: Image.Image, offset: int, count: int, depth: int = 8) -> np.ndarray:
    """The labels of an image of 8-bit greys or of a palette's numbers, (H, W) uint8.

    offset: added to every value modulo 256, so that with 1 the 255 of unlabelled pixels becomes 0. count: labels after
    it are 0 to count - 1. depth: bits of a channel according to the PNG's header; Pillow stretches greys of 2 and 4
    bits to 0..255, which is undone. Raises RecordRejected: labels_unreadable for other modes, such as 16-bit greys and
    colours, which no conversion makes right; label_out_of_range.
    """
    if image.mode not in MODES:
        what = REFUSED.get(image.mode, f"mode {image.mode}")
        raise RecordRejected("labels_unreadable", f"its pixels are {what}, not 8-bit grey or a palette's numbers")
    values = np.asarray(image, dtype=np.uint8)
    if image.mode == "L" and depth < 8:
        values = values // np.uint8(255 // (2**depth - 1))
    labels = values + np.uint8(offset)
    if labels.size and (largest := int(labels.max())) >= count:
        value = (largest - offset) % 256
        added = f" and with offset {offset} {largest}" if offset else ""
        raise RecordRejected("label_out_of_range", f"a pixel is {value}{added}, the labels are 0 to {count - 1}")
    return labels


def sample_labels(labels_HW: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """The label at the middle of each of `cells` (height, width) equal cells of a label map (H, W); where the middle
    lies between two pixels, of the one after it."""
    rows, columns = (
        (2 * np.arange(many) + 1) * side // (2 * many) for many, side in zip(cells, labels_HW.shape, strict=True)
    )
    return np.ascontiguousarray(labels_HW[rows[:, None], columns])


def flip(labels_HW: np.ndarray) -> np.ndarray:
    """Labels with left and right exchanged."""
    return np.ascontiguousarray(labels_HW[:, ::-1])


def read_label_file(data: bytes, facts: LabelFacts, where: str = "labels") -> np.ndarray:
    """The label map (H, W) uint8 of a PNG, for sampling; facts.offset is added. where: its name, for messages. Raises
    ConfigError."""
    return read_png(
        data,
        where,
        "a PNG of label numbers",
        lambda image, depth: label_map(image, facts.offset, facts.count, depth),
    )


def labels_of_file(data: bytes, facts: LabelFacts, latent: tuple[int, int], where: str = "labels") -> np.ndarray:
    """The label map of a PNG as it is stored for a latent of (h, w), (facts.grid h, facts.grid w) uint8, for sampling.
    where: its name, for messages. Raises ConfigError."""
    labels = read_label_file(data, facts, where)
    return sample_labels(labels, (facts.grid * latent[0], facts.grid * latent[1]))
