"""A judge at work: what images are given, and the rows that its figures are made of.

Rows of the records' own pictures and of a trivial method's do not depend on the model, so an Evaluator counts them
once, however often it evaluates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.records import Records
from pipeline.evaluation.tasks.judge import Given, Judge, Row, bounds
from pipeline.evaluation.validation import TEXT
from pipeline.models.tasks.task import pick_variant


@dataclass
class Rows:
    """What is counted of the images of one rank, by image number, and of pictures that others made for the same
    conditions: their figures are bounds."""

    drawn: dict[int, Row] = field(default_factory=dict)
    permuted: dict[int, Row] = field(default_factory=dict)
    baseline: dict[int, Row] = field(default_factory=dict)
    reconstruction: dict[int, Row] = field(default_factory=dict)

    def merge(self, other: Rows) -> None:
        """Add another rank's rows."""
        for name, rows in vars(other).items():
            getattr(self, name).update(rows)


class Judging:
    """What the evaluations of one run share of a judge.

    seed: of the evaluation, which chooses a record's variant by image number as the task does.
    """

    def __init__(self, judge: Judge, records: Records, seed: int) -> None:
        self.judge, self._records, self._seed = judge, records, seed
        self._validation = records.validation
        self._arrays = {name: self._validation.arrays[name] for name in judge.given if name != TEXT}
        self._texts = self._validation.texts if TEXT in judge.given else None
        conditions = self._validation.contract.conditions
        self._variants = {
            "cond.lowres": conditions.lowres.variants if conditions.lowres else 1,
            "cond.mask": conditions.mask.variants if conditions.mask else 1,
            "cond.masked": conditions.mask.variants if conditions.mask else 1,
        }
        self._known = Rows()

    def batch(self, numbers: Sequence[int], images: int, device: torch.device) -> dict[str, Tensor]:
        """The arrays that condition images `numbers` of an evaluation of `images`, for the task to prepare."""
        members = self.judge.members(self._arrays, numbers, images)
        if self._texts is not None:
            members[TEXT] = self._texts.states(self._records.of(numbers))
        return {name: torch.from_numpy(array).to(device) for name, array in members.items()}

    def given(self, numbers: Sequence[int], images: int) -> Given:
        """The same but for captions' states, as the judge reads it."""
        return self._given(numbers, self.judge.members(self._arrays, numbers, images))

    def add(self, rows: Rows, numbers: Sequence[int], drawn: np.ndarray, given: Given, images: int) -> None:
        """Count pictures (B, H, W, 3) uint8 as they were drawn for images `numbers`."""
        judge = self.judge
        rows.drawn |= dict(zip(numbers, judge.rows(drawn, given), strict=True))
        if not judge.looks:
            return
        if judge.permutes or judge.perceptual is not None:
            after = self.given([number + 1 for number in numbers], images)
            rows.permuted |= dict(zip(numbers, judge.permuted(drawn, after), strict=True))
        own = [number for number in numbers if number < len(self._validation)]
        if missing := [number for number in own if number not in self._known.reconstruction]:
            of_records = self._given(missing, Judge.members(judge, self._arrays, missing, images))
            counted = judge.rows(self._records.decoded(missing), of_records)
            self._known.reconstruction |= dict(zip(missing, counted, strict=True))
            if (others := judge.baseline(of_records)) is not None:
                self._known.baseline |= dict(zip(missing, judge.rows(others, of_records), strict=True))
        for name in ("reconstruction", "baseline"):
            known = getattr(self._known, name)
            getattr(rows, name).update({number: known[number] for number in own if number in known})

    def figures(self, rows: Rows) -> dict[str, Any]:
        """The judge's figures with their error bars and bounds, from the rows of all ranks."""
        in_order = {name: [of[number] for number in sorted(of)] for name, of in vars(rows).items()}
        drawn, records = in_order.pop("drawn"), in_order["reconstruction"]
        metrics = self.judge.summary(drawn, records)
        limits = bounds(self.judge, in_order, records)
        return metrics | {name: value for name, value in limits.items() if name.rpartition("_")[0] in metrics}

    def facts(self, images: int) -> dict[str, Any]:
        """How the figures are made, for the card."""
        return self.judge.facts(self._arrays, images)

    def _given(self, numbers: Sequence[int], members: Mapping[str, np.ndarray]) -> Given:
        truth = self._records.pixels(numbers) if self.judge.compares and self.judge.has_truth else None
        return Given(
            captions=[self._validation.captions[i] for i in self._records.of(numbers)],
            members={name: self._chosen(name, array, numbers) for name, array in members.items()},
            truth=truth,
            reconstruction=self._records.decoded(numbers) if self.judge.compares and truth is None else None,
        )

    def _chosen(self, name: str, array: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """The variant of each row that the task sees."""
        variants = self._variants.get(name, 1)
        return pick_variant(torch.from_numpy(array), variants, self._seed, torch.tensor(numbers)).numpy()
