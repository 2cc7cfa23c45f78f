"""Label maps: whether pictures of the shapes world show the labels that were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.tasks import figures
from pipeline.evaluation.shapes import match
from pipeline.evaluation.shapes.world import CANVAS, are_labels, is_canvas
from pipeline.evaluation.tasks.judge import Given, Judge, Row
from pipeline.inference.shown import coloured

MEMBER = "cond.labels"
MOST_NAMED = 12
"""Labels that the words beside a picture name."""


class SemanticJudge(Judge):
    """Mean IoU over all labels and over all but the background's, from sums over all pictures, and the share of cells
    with their label, which the background alone makes high."""

    figures = figures.SEMANTIC
    permutes = True

    @property
    def looks(self) -> bool:
        facts = self.contract.conditions.labels
        return facts is not None and self.size == (CANVAS, CANVAS) and are_labels(facts.names, facts.count)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels, or ()."""
        facts = self.contract.conditions.labels
        return facts.names if facts is not None else ()

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """label_accuracy: share of cells. both_K, either_K: as in shapes/match.py."""
        if not self.looks or not is_canvas(drawn):
            return [{} for _ in drawn]
        rows: list[Row] = []
        for picture, asked in zip(drawn, given.members[MEMBER], strict=True):
            counts = match.labels(picture, asked)
            rows.append({"label_accuracy": counts.pop("accuracy"), **counts})
        return rows

    def pooled(self, name: str, rows: Sequence[Row]) -> float | None:
        return match.mean_iou(rows, first=int(name == "label_iou_foreground"))

    def show(self, given: Given, i: int) -> np.ndarray | None:
        return coloured(given.members[MEMBER][i], self.size, self.names) if all(self.size) else None

    def words(self, given: Given, i: int) -> str:
        """The labels that occur, the largest first, where they have names; else the caption."""
        names = self.names
        labels, counts = np.unique(given.members[MEMBER][i], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:MOST_NAMED]
        return ", ".join(names[k] for k in labels[order] if k < len(names)) if names else given.captions[i]


JUDGE = SemanticJudge
