"""Masks: how near what was put into holes is to the records' own pictures, and what became of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.conditions.mask import unpack
from pipeline.config.tasks import figures
from pipeline.data.format.contract import Contract
from pipeline.evaluation.metrics.distance import distances
from pipeline.evaluation.metrics.restoration import psnr, squared_error
from pipeline.evaluation.shapes.claims import parse
from pipeline.evaluation.shapes.match import completed
from pipeline.evaluation.shapes.world import has_names, is_canvas
from pipeline.evaluation.tasks.judge import Given, Judge, Row

MEMBER = "cond.mask"
HOLE = {"grey": 128, "black": 0}
"""Levels with which a hole is shown."""


class InpaintJudge(Judge):
    """PSNR inside the hole, from sums over all pictures; that outside it before pasting, which is what the autoencoder
    and the sampler change; the perceptual distance of the whole pasted picture; and in the shapes world the share of
    partly hidden objects that are completed. Holes filled with the median colour of what is around them are judged
    beside it."""

    figures = figures.INPAINT
    free = ("psnr_outside",)
    looks = True  # type: ignore[assignment]

    def holes(self, given: Given) -> np.ndarray:
        """The pixels to make, (B, H, W) bool."""
        return holes_of(given, self.contract)

    def finish(self, drawn: np.ndarray, given: Given) -> np.ndarray:
        """The record's own picture outside the hole, at full resolution."""
        return np.where(self.holes(given)[..., None], drawn, given.pictures)

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """inside, of_inside, outside, of_outside: squared error and number of values. completed, of_completed:
        objects."""
        finished, holes, rows = self.finish(drawn, given), self.holes(given), list[Row]()
        far = distances(self.perceptual, finished, given.pictures)
        for i, (hole, truth) in enumerate(zip(holes, given.pictures, strict=True)):
            inside, count_inside = squared_error(finished[i], truth, hole)
            outside, count_outside = squared_error(drawn[i], truth, ~hole)
            row: dict[str, float | None] = far[i] | {
                "inside": inside,
                "of_inside": count_inside,
                "outside": outside,
                "of_outside": count_outside,
            }
            if is_canvas(drawn) and (has_names(self.contract.conditions) or parse(given.captions[i]) is not None):
                row["completed"], row["of_completed"] = completed(finished[i], truth, hole)
            rows.append(row)
        return rows

    def permuted(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """The distance alone, of what was made for one hole in another's."""
        return list(distances(self.perceptual, self.finish(drawn, given), given.pictures))

    def pooled(self, name: str, rows: Sequence[Row]) -> float | None:
        part = name.removeprefix("psnr_")
        return psnr(*(sum(row.get(key) or 0 for row in rows) for key in (part, f"of_{part}")))  # type: ignore[arg-type]

    def baseline(self, given: Given) -> np.ndarray | None:
        """Holes in the median colour of the picture around them."""
        filled = given.pictures.copy()
        for picture, hole in zip(filled, self.holes(given), strict=True):
            around = picture[~hole]
            picture[hole] = np.median(around, axis=0).round() if len(around) else 128
        return filled

    def show(self, given: Given, i: int) -> np.ndarray | None:
        facts = self.contract.conditions.mask
        picture = given.pictures[i].copy()
        picture[self.holes(given)[i]] = HOLE[facts.hole if facts is not None else "grey"]
        return picture

    def words(self, given: Given, i: int) -> str:
        return given.captions[i] if "text" in self.task.members else ""

    def facts(self, records: Any, images: int) -> dict[str, Any]:
        return super().facts(records, images) | {"pasted": True}


def holes_of(given: Given, contract: Contract) -> np.ndarray:
    """The holes of a batch's records, (B, H, W) bool. contract: of their cache."""
    facts, masks = contract.conditions.mask, given.members[MEMBER]
    width = given.pictures.shape[2]
    return (unpack(masks, width) if facts is not None and facts.packed else masks).astype(bool)


JUDGE = InpaintJudge
