"""Nothing was asked: whether pictures of the shapes world show known shapes, whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config.tasks import figures
from pipeline.evaluation.shapes.claims import parse
from pipeline.evaluation.shapes.match import is_whole
from pipeline.evaluation.shapes.world import CANVAS, has_names, is_canvas
from pipeline.evaluation.tasks.judge import Given, Judge, Row


class UnconditionalJudge(Judge):
    """Share of pictures that show one to three known shapes whole, where the cache is of the shapes world."""

    figures = figures.UNCONDITIONAL

    @property
    def looks(self) -> bool:
        """Whether the cache may be of the shapes world."""
        return self.size == (CANVAS, CANVAS) and (has_names(self.contract.conditions) or self.contract.text is not None)

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """whole_shapes: 1 if the picture shows one to three known shapes; without an entry where neither the cache's
        names nor the record's caption are of the world."""
        if not self.looks or not is_canvas(drawn):
            return [{} for _ in drawn]
        return [
            {"whole_shapes": int(is_whole(picture))}
            if has_names(self.contract.conditions) or parse(caption) is not None
            else {}
            for picture, caption in zip(drawn, given.captions, strict=True)
        ]

    def summary(self, rows: Sequence[Row], records: Sequence[Row] = ()) -> dict[str, Any]:
        return super().summary(rows, records) if all(rows) else {}

    def words(self, given: Given, i: int) -> str:
        return ""


JUDGE = UnconditionalJudge
