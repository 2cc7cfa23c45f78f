"""Small images: how near pictures are to the records' own, and to the small image that they were made from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.conditions.lowres import enlarge, lowres
from pipeline.config.tasks import figures
from pipeline.evaluation.metrics.distance import distances
from pipeline.evaluation.metrics.restoration import psnr, squared_error, ssim
from pipeline.evaluation.tasks.judge import Given, Judge, Row
from pipeline.inference.shown import enlarged

MEMBER = "cond.lowres"


class SuperresJudge(Judge):
    """PSNR, SSIM and perceptual distance of each picture, and its consistency: the PSNR of the small image that it
    becomes against the one that was given. Bicubic enlargement is judged beside it. PSNR favours blur (the paper's own
    regression exceeds its diffusion model in it), so the distance and FID belong beside it."""

    figures = figures.SUPERRES
    looks = True  # type: ignore[assignment]

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        far = distances(self.perceptual, drawn, given.pictures)
        rows: list[Row] = []
        for i, (picture, truth, small) in enumerate(zip(drawn, given.pictures, given.members[MEMBER], strict=True)):
            rows.append(
                far[i]
                | {
                    "psnr": psnr(*squared_error(picture, truth)),
                    "ssim": ssim(picture, truth),
                    "consistency": psnr(*squared_error(self.reduced(picture), small)),
                }
            )
        return rows

    def permuted(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """The distance to another picture alone."""
        return list(distances(self.perceptual, drawn, given.pictures))

    def reduced(self, picture: np.ndarray) -> np.ndarray:
        """A picture (H, W, 3) uint8 as its small image, (3, h, w) uint8: as the cache made it where that was by box or
        bicubic, and by bicubic where it was by chance or by others."""
        facts = self.contract.conditions.lowres
        assert facts is not None, "task=superres without facts of small images"
        plain = replace(facts, degradation="box" if facts.degradation == "box" else "bicubic", variants=1)
        return lowres(picture, plain, "", None)

    def baseline(self, given: Given) -> np.ndarray | None:
        """Bicubic enlargement."""
        height, width = given.pictures.shape[1:3]
        return np.stack([enlarge(small, (width, height)) for small in given.members[MEMBER]])

    def show(self, given: Given, i: int) -> np.ndarray | None:
        height, width = given.pictures.shape[1:3]
        return enlarged(np.ascontiguousarray(given.members[MEMBER][i].transpose(1, 2, 0)), (width, height))

    def words(self, given: Given, i: int) -> str:
        return given.captions[i] if "text" in self.task.members else ""


JUDGE = SuperresJudge
