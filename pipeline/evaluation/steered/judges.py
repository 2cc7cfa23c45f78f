"""Guides: whether pictures have become what a guide led them to, whatever the model's own task is.

Each is judged as the task would be that is trained for it: a picture as superres, a caption as text, a class as class.
Bounds are those of judges; without a guide (guide.weight=0) the figure is that of the model alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.conditions.lowres import bicubic
from pipeline.config import ClassTask, UnconditionalTask
from pipeline.config.tasks import figures
from pipeline.data.format.contract import Contract
from pipeline.evaluation.metrics.restoration import psnr, squared_error
from pipeline.evaluation.shapes.world import CANVAS
from pipeline.evaluation.tasks.classes import ClassJudge
from pipeline.evaluation.tasks.judge import Given, Judge, Row
from pipeline.evaluation.tasks.text import TextJudge
from pipeline.inference.steering.image import Target, brightness


class LikenessJudge(Judge):
    """Consistency with the target: the PSNR of each picture, made as small as its target, against the target, in 8 bits
    and where the target counts. The target is the record's own picture, made smaller by Pillow's bicubic filter."""

    figures = figures.GUIDED
    permutes = True
    looks = True  # type: ignore[assignment]

    def __init__(self, contract: Contract, factor: int, mask_HW: np.ndarray | None = None, grey: bool = False) -> None:
        """mask_HW: (h, w) of 0 and 1, of the target's size."""
        super().__init__(contract, UnconditionalTask())
        self._factor, self._mask, self._grey = factor, mask_HW, grey

    def targets(self, given: Given) -> list[Target]:
        """The target of each image."""
        return [
            Target(bicubic(picture, self._factor), self._factor, self._mask, self._grey) for picture in given.pictures
        ]

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        where = None if self._mask is None else self._mask != 0
        rows: list[Row] = []
        for picture, target in zip(drawn, self.targets(given), strict=True):
            pair = [bicubic(picture, self._factor), target.picture]
            a, b = map(brightness, pair) if self._grey else pair
            rows.append({"guide_consistency": psnr(*squared_error(a, b, where))})
        return rows

    def show(self, given: Given, i: int) -> np.ndarray | None:
        return Target(bicubic(given.pictures[i], self._factor), self._factor, self._mask, self._grey).shown()

    def words(self, given: Given, i: int) -> str:
        return ""


class CaptionJudge(TextJudge):
    """Attribute accuracy, by the caption that a picture was led to, and by the next image's. CLIP's own score is no
    figure here: the guide climbs it."""

    permutes = True

    def __init__(self, contract: Contract) -> None:
        super().__init__(contract, UnconditionalTask())

    @property
    def looks(self) -> bool:
        return self.size == (CANVAS, CANVAS)

    def wanted(self, given: Given) -> Sequence[str]:
        """The caption of each image."""
        return given.captions


class LedClassJudge(ClassJudge):
    """Class accuracy, by the class that a picture was led to."""

    def __init__(self, contract: Contract) -> None:
        super().__init__(contract, ClassTask())

    def wanted(self, given: Given) -> list[int]:
        """The class of each image."""
        return [int(k) for k in given.members["cond.class"]]
