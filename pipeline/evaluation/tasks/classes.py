"""Classes: whether pictures of the shapes world show their class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config.tasks import figures
from pipeline.evaluation.shapes.match import of_class
from pipeline.evaluation.shapes.world import CANVAS, are_objects, is_canvas
from pipeline.evaluation.tasks.judge import Given, Judge, Row

MEMBER = "cond.class"
LONE_SHARE = 0.75
"""Share of the records' pictures with one object alone above which a cache is of lone objects. It is near 1 there, and
near one half where scenes have one to three objects."""
EACH = 5
"""Records of each class, on average, from which it shows whether classes occur evenly."""


class ClassJudge(Judge):
    """Class accuracy: of lone objects, the share of pictures that show an object of their class and nothing else; of
    scenes of several, the share whose largest object is of the class."""

    figures = figures.CLASSES
    permutes = True

    @property
    def looks(self) -> bool:
        facts = self.contract.conditions.classes
        return facts is not None and self.size == (CANVAS, CANVAS) and are_objects(facts.names)

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """alone: 1 if the picture shows an object of its class and nothing else. largest: 1 if its largest object is of
        the class."""
        if not self.looks or not is_canvas(drawn):
            return [{} for _ in drawn]
        pairs = (of_class(picture, int(k) + 1) for picture, k in zip(drawn, given.members[MEMBER], strict=True))
        return [{"alone": int(alone), "largest": int(largest)} for alone, largest in pairs]

    def summary(self, rows: Sequence[Row], records: Sequence[Row] = ()) -> dict[str, Any]:
        kind = self.judged(records)
        return super().summary([{"class_accuracy": row[kind]} for row in rows if kind in row], records)

    @staticmethod
    def judged(records: Sequence[Row]) -> str:
        """Which claim the cache's pictures allow: "alone" or "largest"."""
        rows = [row for row in records if row]
        return "alone" if not rows or sum(row["alone"] or 0 for row in rows) > LONE_SHARE * len(rows) else "largest"

    def words(self, given: Given, i: int) -> str:
        facts, k = self.contract.conditions.classes, int(given.members[MEMBER][i])
        return facts.names[k] if facts is not None and k < len(facts.names) else f"class {k}"

    def balanced(self, records: Mapping[str, np.ndarray], images: int) -> bool:
        """Whether classes are drawn as image number modulo their number: where the records' classes occur as evenly as
        chance allows (a chi-squared test), and there are as many images as classes. Elsewhere they are the records',
        so that a reference of such records has the same mixture."""
        facts = self.contract.conditions.classes
        classes = records[MEMBER]
        if facts is None or images < facts.count or len(classes) < EACH * facts.count:
            return False
        expected = len(classes) / facts.count
        distance = float(np.square(np.bincount(classes, minlength=facts.count) - expected).sum() / expected)
        freedom = facts.count - 1
        return distance <= freedom + 3 * math.sqrt(2 * freedom)

    def members(self, records: Mapping[str, np.ndarray], numbers: Sequence[int], images: int) -> dict[str, np.ndarray]:
        members = super().members(records, numbers, images)
        facts = self.contract.conditions.classes
        if facts is not None and self.balanced(records, images):
            members[MEMBER] = (np.array(numbers) % facts.count).astype(np.int32)
        return members

    def facts(self, records: Mapping[str, np.ndarray], images: int) -> dict[str, Any]:
        return super().facts(records, images) | {"classes": "even" if self.balanced(records, images) else "records"}


JUDGE = ClassJudge
