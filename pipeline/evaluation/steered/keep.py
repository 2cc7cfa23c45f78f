"""Images that keep the records' own pictures outside of a mask: how near what is kept is, before it is put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.config.tasks import figures
from pipeline.diffusion.hooks import Hooks, Keep
from pipeline.evaluation.metrics.restoration import psnr, squared_error
from pipeline.evaluation.records import Records
from pipeline.evaluation.steering import RecordSteering
from pipeline.evaluation.tasks.inpaint import MEMBER, holes_of
from pipeline.evaluation.tasks.judge import Given, Judge, Row
from pipeline.inference.steering.images import made_anew


class KeepJudge(Judge):
    """PSNR outside of the mask before pasting, from sums over all pictures, as that of inpainting."""

    figures = figures.KEPT
    looks = True  # type: ignore[assignment]

    @property
    def given(self) -> tuple[str, ...]:
        return (MEMBER,)

    def holes(self, given: Given) -> np.ndarray:
        """The pixels to make anew, (B, H, W) bool."""
        return holes_of(given, self.contract)

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """kept, of_kept: squared error and number of values."""
        rows: list[Row] = []
        for picture, truth, hole in zip(drawn, given.pictures, self.holes(given), strict=True):
            error, count = squared_error(picture, truth, ~hole)
            rows.append({"kept": error, "of_kept": count})
        return rows

    def pooled(self, name: str, rows: Sequence[Row]) -> float | None:
        assert name == "psnr_kept", name
        return psnr(*(sum(row[key] or 0 for row in rows) for key in ("kept", "of_kept")))  # type: ignore[arg-type]


class RecordKeep(RecordSteering):
    """Keeps the latents of image i's record where no pixel of a latent position is in the hole, and its picture outside
    of the hole."""

    def __init__(self, judge: KeepJudge, records: Records) -> None:
        self._judge, self._records = judge, records
        self.judge = judge

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"keep": True}

    def hooks(self, numbers: Sequence[int], given: Given) -> Hooks:
        latents = self._records.latents(numbers)
        holes = torch.from_numpy(self._judge.holes(given)[:, None].astype(np.uint8))
        return Hooks(keep=Keep(latents, made_anew(holes, self._judge.contract.downsampling).to(latents.device)))

    def finish(self, drawn: np.ndarray, given: Given) -> np.ndarray:
        return np.where(self._judge.holes(given)[..., None], drawn, given.pictures)
