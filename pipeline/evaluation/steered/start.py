"""Images that begin from the records' own pictures: how much of these is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config import TaskConfig
from pipeline.config.tasks import figures
from pipeline.data.format.contract import Contract
from pipeline.diffusion.hooks import Hooks, Start
from pipeline.evaluation.metrics.restoration import psnr, squared_error
from pipeline.evaluation.records import Records
from pipeline.evaluation.steering import RecordSteering
from pipeline.evaluation.tasks.classes import MEMBER, ClassJudge
from pipeline.evaluation.tasks.judge import Given, Judge, Row


class StartJudge(Judge):
    """PSNR to the pictures that images begin from, from sums over all pictures; in the shapes world with classes, also
    the share that still shows its record's class, as class accuracy counts it."""

    figures = figures.START
    looks = True  # type: ignore[assignment]

    def __init__(self, contract: Contract, task: TaskConfig) -> None:
        super().__init__(contract, task)
        classes = ClassJudge(contract, task)
        self.classes = classes if classes.looks else None

    @property
    def given(self) -> tuple[str, ...]:
        return () if self.classes is None else (MEMBER,)

    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """start, of_start: squared error and number of values. alone, largest: as ClassJudge's."""
        shown: list[Row] = [{}] * len(drawn) if self.classes is None else self.classes.rows(drawn, given)
        rows: list[Row] = []
        for picture, truth, claims in zip(drawn, given.pictures, shown, strict=True):
            error, count = squared_error(picture, truth)
            rows.append({**claims, "start": error, "of_start": count})
        return rows

    def pooled(self, name: str, rows: Sequence[Row]) -> float | None:
        assert name == "psnr_start", name
        return psnr(*(sum(row[key] or 0 for row in rows) for key in ("start", "of_start")))  # type: ignore[arg-type]

    def summary(self, rows: Sequence[Row], records: Sequence[Row] = ()) -> dict[str, Any]:
        if self.classes is not None:
            kind = ClassJudge.judged([row for row in records if "alone" in row])
            rows = [{**row, "class_kept": row[kind]} if kind in row else row for row in rows]
        return super().summary(rows, records)


class RecordStart(RecordSteering):
    """Begins image i from the latents of its record. strength: as Start's."""

    def __init__(self, judge: StartJudge, records: Records, strength: float) -> None:
        self.judge, self._records, self._strength = judge, records, strength

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"strength": self._strength}

    def hooks(self, numbers: Sequence[int], given: Given) -> Hooks:
        return Hooks(start=Start(self._records.latents(numbers), self._strength))
