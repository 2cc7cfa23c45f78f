"""Boxes with classes: whether pictures of the shapes world show them where they were asked for."""

from __future__ import annotations

import numpy as np

from pipeline.config.tasks import figures
from pipeline.evaluation.shapes import match
from pipeline.evaluation.shapes.world import CANVAS, are_labels, are_objects, is_canvas
from pipeline.evaluation.tasks.judge import Given, Judge, Row
from pipeline.inference.shown import blank, outlined

MEMBER = "cond.boxes"


class LayoutJudge(Judge):
    """Overlap of boxes and objects of their class, boxes that are shown, objects that were asked for."""

    figures = figures.LAYOUT
    permutes = True

    @property
    def looks(self) -> bool:
        facts = self.contract.conditions.boxes
        if facts is None or self.size != (CANVAS, CANVAS):
            return False
        return are_labels(facts.names, facts.count) or are_objects(facts.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, or ()."""
        facts = self.contract.conditions.boxes
        return facts.names if facts is not None else ()

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """The figures' own entries; those of recall and precision are over boxes and over objects."""
        if not self.looks or not is_canvas(drawn):
            return [{} for _ in drawn]
        facts = self.contract.conditions.boxes
        first = 0 if facts is not None and are_labels(facts.names, facts.count) else 1  # label of class 0
        height, width = drawn.shape[1:3]
        rows: list[Row] = []
        for picture, boxes in zip(drawn, given.members[MEMBER], strict=True):
            in_pixels = [
                (label + first, (x0 * width, y0 * height, x1 * width, y1 * height))
                for label, (x0, y0, x1, y1) in boxes_of(boxes)
            ]
            counts = match.layout(picture, in_pixels)
            rows.append(
                {
                    "layout_iou": counts["iou"],
                    "layout_right": counts["right"],
                    "layout_recall": counts["found"],
                    "of_layout_recall": counts["boxes"],
                    "layout_precision": counts["found"],
                    "of_layout_precision": counts["objects"],
                }
            )
        return rows

    def show(self, given: Given, i: int) -> np.ndarray | None:
        if not all(self.size):
            return None
        return outlined(blank(self.size)[None], given.members[MEMBER][i], self.names)[0]

    def words(self, given: Given, i: int) -> str:
        names = self.names
        boxes = ", ".join(names[k] if k < len(names) else f"class {k}" for k, _ in boxes_of(given.members[MEMBER][i]))
        caption = given.captions[i] if "text" in self.task.members else ""
        return "; ".join(part for part in (caption, boxes) if part)


def boxes_of(boxes: np.ndarray) -> list[tuple[int, tuple[float, float, float, float]]]:
    """The boxes of an array (most, 5), without its empty rows: class, and edges as fractions."""
    return [
        (int(k), (float(x0), float(y0), float(x1), float(y1)))
        for k, x0, y0, x1, y1 in boxes.astype(np.float64)
        if k >= 0
    ]


JUDGE = LayoutJudge
