"""Compares what pictures show with classes, boxes, label maps and other pictures, as counts that add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.evaluation.shapes.world import LABELS, UNKNOWN_LABEL, segment, sight

SAME_PLACE = 0.5
"""Intersection over union from which a shown object is the one that was asked for."""
SAME_SIZE = 1.0
"""Pixels of a box's side, within which the oracle cannot tell which object is the larger."""
MOST_HIDDEN = 0.5
"""Share of an object that may be hidden, so that what is seen of it still tells what it is."""
Box = tuple[float, float, float, float]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    whole = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / whole if whole > 0 else 0.0


def of_class(picture: np.ndarray, label: int) -> tuple[bool, bool]:
    """Whether a picture shows an object of the label and nothing else, and whether its largest object, by the sides of
    its box, has the label; objects whose sides differ by SAME_SIZE at most are as large."""
    sides = [(seen_label, _side(thing.box)) for seen_label, thing, _ in sight(picture)]
    longest = max((side for _, side in sides), default=0.0)
    largest = [seen_label for seen_label, side in sides if side >= longest - SAME_SIZE]
    return [seen_label for seen_label, _ in sides] == [label], label in largest


def _side(box: Box) -> float:
    """Mean of a box's width and height."""
    return (box[2] - box[0] + box[3] - box[1]) / 2


def is_whole(picture: np.ndarray) -> bool:
    """Whether a picture shows one to three objects, all of them known, and so whole."""
    labels = [label for label, _, _ in sight(picture)]
    return 1 <= len(labels) <= 3 and UNKNOWN_LABEL not in labels


def layout(picture: np.ndarray, boxes: Sequence[tuple[int, Box]]) -> dict[str, float | None]:
    """How a picture shows boxes (label, edges in pixels), which are matched one to one with its objects of their label,
    the best overlaps first.

    iou: mean over the boxes of the overlap with their object, 0 without one; None without boxes. boxes, objects: how
    many there are. found: boxes whose object overlaps by SAME_PLACE at least. right: 1 if all are found and there is no
    other object.
    """
    seen = [(label, thing.box) for label, thing, _ in sight(picture)]
    overlaps = sorted(
        (
            (overlap, i, j)
            for i, (label, box) in enumerate(boxes)
            for j, (seen_label, seen_box) in enumerate(seen)
            if label == seen_label and (overlap := iou(box, seen_box)) > 0
        ),
        key=lambda entry: -entry[0],
    )
    matched: dict[int, float] = {}
    taken: set[int] = set()
    for overlap, i, j in overlaps:
        if i not in matched and j not in taken:
            matched[i] = overlap
            taken.add(j)
    found = sum(overlap >= SAME_PLACE for overlap in matched.values())
    return {
        "iou": sum(matched.values()) / len(boxes) if boxes else None,
        "boxes": len(boxes),
        "objects": len(seen),
        "found": found,
        "right": float(found == len(boxes) == len(seen)),
    }


def labels(picture: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """How the labels that a picture shows agree with a label map `asked` (h, w) uint8, at the middle of each cell.

    both_K, either_K: cells where both, and where either, have label K, if there are any. accuracy: share of cells with
    the label that was asked for.
    """
    shown = segment(picture)
    rows, columns = (
        ((np.arange(cells) + 0.5) * side / cells).astype(int) for cells, side in zip(asked.shape, shown.shape)
    )
    shown = shown[np.ix_(rows, columns)]
    counts: dict[str, float] = {"accuracy": float((shown == asked).mean())}
    for label in np.union1d(shown, asked):
        if label < LABELS:
            a, b = shown == label, asked == label
            counts |= {f"both_{label}": float((a & b).sum()), f"either_{label}": float((a | b).sum())}
    return counts


def mean_iou(rows: Sequence[Mapping[str, float | None]], first: int = 0) -> float | None:
    """Mean over the labels from `first` on of their intersection over their union, each summed over all rows of
    `labels`; None where no label occurs."""
    shares = []
    for label in range(first, LABELS):
        either = sum(row.get(f"either_{label}") or 0 for row in rows)
        if either:
            shares.append(sum(row.get(f"both_{label}") or 0 for row in rows) / either)
    return sum(shares) / len(shares) if shares else None


def completed(picture: np.ndarray, truth: np.ndarray, hidden: np.ndarray) -> tuple[int, int]:
    """Objects of the true picture of which the hole `hidden` (H, W) bool hides a part, at most MOST_HIDDEN: how many of
    them the picture shows with their label in their place, and how many there are."""
    shown = [(label, thing.box) for label, thing, _ in sight(picture)]
    right = count = 0
    for label, thing, pixels in sight(truth):
        share = float(hidden[pixels].mean())
        if label != UNKNOWN_LABEL and 0 < share <= MOST_HIDDEN:
            count += 1
            right += any(label == other and iou(thing.box, box) >= SAME_PLACE for other, box in shown)
    return right, count
