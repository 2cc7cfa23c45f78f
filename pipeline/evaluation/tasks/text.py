"""Captions: whether pictures of captioned shapes show what their captions claim. The CLIP score is the Evaluator's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config.tasks import figures
from pipeline.evaluation.metrics.error_bars import wilson
from pipeline.evaluation.shapes.claims import parse
from pipeline.evaluation.shapes.oracle import judge
from pipeline.evaluation.shapes.world import is_canvas
from pipeline.evaluation.tasks.judge import Given, Judge, Row

KINDS = ("count", "shape", "colour", "size", "relation", "place")


class TextJudge(Judge):
    """Attribute accuracy, where every caption is one of the shapes world."""

    figures = figures.TEXT

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """attribute_accuracy: 1 if every claim is right. objects: how many the caption names. KIND, of_KIND: right
        claims of each kind, and all of them. unread: 1 for a caption that is none of the world."""
        if not is_canvas(drawn):
            return [{} for _ in drawn]
        return [_row(picture, caption) for picture, caption in zip(drawn, given.captions, strict=True)]

    def summary(self, rows: Sequence[Row], records: Sequence[Row] = ()) -> dict[str, Any]:
        """Nothing unless every caption could be read, since a share of some images does not describe the set."""
        read = [row for row in rows if "objects" in row]
        if not read or any(row.get("unread") for row in rows):
            return {}
        right, by_objects = 0, dict[str, list[float]]()
        for row in read:
            right += round(row["attribute_accuracy"] or 0)
            by_objects.setdefault(str(round(row["objects"] or 0)), []).append(row["attribute_accuracy"] or 0)
        counts = {kind: sum(row.get(f"of_{kind}") or 0 for row in read) for kind in sorted(KINDS)}
        low, high = wilson(right, len(read))
        return {
            "attribute_accuracy": right / len(read),
            "attribute_accuracy_low": low,
            "attribute_accuracy_high": high,
            "attribute_accuracy_by_objects": {
                objects: round(sum(by_objects[objects])) / len(by_objects[objects]) for objects in sorted(by_objects)
            },
            "attribute_accuracy_by_attribute": {
                kind: round(sum(row.get(kind) or 0 for row in read)) / count for kind, count in counts.items() if count
            },
        }


def _row(picture: np.ndarray, caption: str) -> Row:
    claims = parse(caption)
    if claims is None:
        return {"unread": 1}
    verdict = judge(picture, claims)
    row: dict[str, float | None] = {"attribute_accuracy": int(verdict.correct), "objects": len(claims.objects)}
    for kind, holds in verdict.claims():
        row[kind] = (row.get(kind) or 0) + holds
        row[f"of_{kind}"] = (row.get(f"of_{kind}") or 0) + 1
    return row


JUDGE = TextJudge
