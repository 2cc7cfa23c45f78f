"""cond.boxes: boxes with classes, as fractions of the crop."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.conditions.facts import MOST_BOX_CLASSES, BoxFacts
from pipeline.conditions.names import number_of
from pipeline.errors import ConfigError, ParseError, RecordRejected
from pipeline.parsing.text import one_line
from pipeline.parsing.values import parse_json

ROW = 5
"""class, x0, y0, x1, y1."""
SLACK = 1e-6
"""How far outside of the image an edge may lie, as others round: such edges are clipped."""
LARGEST = sys.float_info.max
FILE_BYTES = 1 << 20
FORM = 'boxes are [[class, x0, y0, x1, y1], ...] with edges as fractions of the image, or {"boxes": such a list}'


class CropBox(Protocol):
    """Where a crop lies. resized: (width, height) in pixels that the image was resized to. box: (left, top, width,
    height) of the crop in it, in pixels."""

    @property
    def resized(self) -> tuple[int, int]: ...

    @property
    def box(self) -> tuple[int, int, int, int]: ...


@dataclass(frozen=True)
class _Whole:
    resized: tuple[int, int] = (1, 1)
    box: tuple[int, int, int, int] = (0, 0, 1, 1)


WHOLE = _Whole()
"""The crop that is the whole image, whatever its size."""


def read_boxes(entries: Any) -> np.ndarray:
    """(N, 5) float64 of a column [[class, x0, y0, x1, y1], ...] with edges as fractions of the image, from its left and
    top.

    Raises RecordRejected: boxes_missing; boxes_unreadable for what is no such list of finite numbers, or a class that
    is no whole number from 0 to 2048; boxes_inverted for x0 > x1 or y0 > y1; boxes_outside for an edge that lies
    outside of the image by more than SLACK.
    """
    if entries is None:
        raise RecordRejected("boxes_missing")
    if not isinstance(entries, list):
        raise RecordRejected("boxes_unreadable", "it is not a list")
    if not all(isinstance(entry, list) and len(entry) == ROW and all(map(_is_number, entry)) for entry in entries):
        raise RecordRejected("boxes_unreadable", "not every box is [class, x0, y0, x1, y1] of numbers")
    boxes = np.array(entries, dtype=np.float64).reshape(-1, ROW)
    classes, low, high = boxes[:, 0], boxes[:, 1:3], boxes[:, 3:]
    if (classes != np.floor(classes)).any() or (classes < 0).any() or (classes > MOST_BOX_CLASSES).any():
        raise RecordRejected("boxes_unreadable", f"a class is no whole number from 0 to {MOST_BOX_CLASSES}")
    if (inverted := (low > high).any(axis=1)).any():
        raise RecordRejected("boxes_inverted", f"{_shown(boxes[inverted][0])} has x0 > x1 or y0 > y1")
    outside = ((low < -SLACK) | (high > 1 + SLACK)).any(axis=1)
    if outside.any():
        raise RecordRejected("boxes_outside", f"{_shown(boxes[outside][0])}: edges are fractions of the image, 0 to 1")
    boxes[:, 1:] = boxes[:, 1:].clip(0, 1)
    return boxes


def crop_boxes(boxes_N5: np.ndarray, crop: CropBox, facts: BoxFacts) -> tuple[np.ndarray, int]:
    """The boxes of a crop, and how many of its boxes were left out.

    boxes_N5: float64, class and edges as fractions of the image. Returns (facts.most, 5) float16: class and edges as
    fractions of the crop, clipped by it, in the source's order, then rows of -1. Boxes outside of the crop are not
    counted; left out and counted are boxes smaller than facts.min_area, or without area in float16, and of what is then
    too many the smallest (of equal areas the last). Raises RecordRejected, box_class_out_of_range.
    """
    if len(boxes_N5) and boxes_N5[:, 0].max() >= facts.count:
        largest = int(boxes_N5[:, 0].max())
        raise RecordRejected("box_class_out_of_range", f"{largest}, the classes are 0 to {facts.count - 1}")
    resized, (left, top, width, height) = np.array(crop.resized * 2, dtype=np.float64), crop.box
    edges = (boxes_N5[:, 1:] * resized - [left, top, left, top]) / [width, height, width, height]
    touches = (edges[:, :2] < 1).all(axis=1) & (edges[:, 2:] > 0).all(axis=1)
    inside = np.concatenate([boxes_N5[:, :1], edges.clip(0, 1)], axis=1)[touches]
    stored, areas = inside.astype(np.float16), (inside[:, 3:] - inside[:, 1:3]).prod(axis=1)
    large = (stored[:, 3:] > stored[:, 1:3]).all(axis=1) & (areas >= facts.min_area)
    stored, areas = stored[large], areas[large]
    kept = np.sort(np.argsort(-areas, kind="stable")[: facts.most])
    result = np.full((facts.most, ROW), -1, dtype=np.float16)
    result[: len(kept)] = stored[kept]
    return result, len(inside) - len(kept)


def flip_boxes(boxes: np.ndarray) -> np.ndarray:
    """Stored boxes (most, 5) float16 with left and right exchanged."""
    flipped, used = boxes.copy(), boxes[:, 0] >= 0
    flipped[used, 1], flipped[used, 3] = 1 - boxes[used, 3], 1 - boxes[used, 1]
    return flipped


def boxes_of_file(data: bytes, facts: BoxFacts, where: str = "boxes") -> np.ndarray:
    """The boxes of a JSON file as they are stored, (facts.most, 5) float16, for sampling.

    data: [[class, x0, y0, x1, y1], ...] or {"boxes": such a list}; a class is a number or one of facts.names. where:
    the file's name, for messages. Raises ConfigError for what encode would reject or leave out.
    """
    try:
        value = parse_json(data, FILE_BYTES)
        entries = value.get("boxes") if isinstance(value, dict) else value
        if not isinstance(entries, list):
            raise ParseError("it holds no list of boxes")
        rows = [_numbered(entry, facts) for entry in entries]
        stored, cut = crop_boxes(read_boxes(rows), WHOLE, facts)
    except (ParseError, RecordRejected) as error:
        raise ConfigError(one_line(f"{where}: {error} ({FORM})")) from None
    except ConfigError as error:
        raise ConfigError(one_line(f"{where}: {error}")) from None
    if len(rows) > facts.most:
        raise ConfigError(
            f"{where}: it has {len(rows)} boxes, the model was given at most {facts.most}: leave some out"
        )
    if cut or (stored[:, 0] >= 0).sum() < len(rows):
        raise ConfigError(
            f"{where}: a box is smaller than what the model was trained with (min_area={facts.min_area:g}): enlarge it"
        )
    return stored


def _numbered(entry: Any, facts: BoxFacts) -> Any:
    """A row with its class as a number."""
    if isinstance(entry, list) and entry and isinstance(entry[0], str):
        return [number_of(entry[0], facts.names, facts.count), *entry[1:]]
    return entry


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _shown(row: np.ndarray) -> str:
    return f"[{', '.join(f'{number:g}' for number in row)}]"
