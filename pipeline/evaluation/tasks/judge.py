"""The interface of a judge, which measures the pictures of one task.

A judge turns each picture into a row of plain numbers, and all rows into figures with error bars, so that any world
size gives the same figures. The Evaluator (evaluation/evaluate.py) has the same judge look at other pictures too, which
gives the bounds between which a figure lies:
    NAME_permuted        the pictures, judged by what the next image was given
    NAME_baseline        the pictures of a trivial method
    NAME_reconstruction  the records' own pictures after the autoencoder
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from pipeline.config import TaskConfig
from pipeline.config.tasks.figures import PERCEIVED, TO_RECONSTRUCTION, Figure
from pipeline.config.tasks.found import facts_of, found
from pipeline.data.format.contract import Contract
from pipeline.evaluation.figures import standard_error
from pipeline.evaluation.metrics.error_bars import half_sample_error, wilson
from pipeline.models.perceptual.network import Perceptual, require_side

FEWEST = 4
"""Pictures from which a pooled figure has an error bar: half of them are still two."""
Row = Mapping[str, float | None]
"""What is counted of one picture; None, or no entry, where there is nothing to count."""


@dataclass(frozen=True)
class Given:
    """What a batch of B images was given, and the pictures of the records that it was taken from.

    captions: "" for none. members: the arrays that the judge is given, captions' states excepted, (B, ...), in the
    cache's dtypes and with the variant that the image number chooses. truth: the records' own pictures (B, H, W, 3)
    uint8; None where the cache does not hold them. reconstruction: the same after the autoencoder; None where nothing
    needs it.
    """

    captions: Sequence[str]
    members: Mapping[str, np.ndarray]
    truth: np.ndarray | None = None
    reconstruction: np.ndarray | None = None

    @property
    def pictures(self) -> np.ndarray:
        """The records' pictures, as they are or else reconstructed."""
        pictures = self.reconstruction if self.truth is None else self.truth
        assert pictures is not None, "a judge that compares pictures was given none"
        return pictures


class Judge(ABC):
    """What measures the pictures of a task.

    contract: of the cache whose conditions are sampled. size: (width, height) of its pictures, (0, 0) where they
    differ.
    """

    figures: ClassVar[tuple[Figure, ...]] = ()
    """Its figures, as in the task's row of the table; the first that there is means "best"."""
    permutes: ClassVar[bool] = False
    """Whether judging pictures by what the next image was given is a bound of the figures."""
    free: ClassVar[tuple[str, ...]] = ()
    """Figures that the trivial method has by doing nothing, so that these say nothing."""
    perceptual: Perceptual | None = None
    """The perceptual distance, for judges that measure it; None for none."""

    def __init__(self, contract: Contract, task: TaskConfig) -> None:
        self.contract, self.task = contract, task
        self.size = contract.buckets[0] if len(contract.buckets) == 1 else (0, 0)
        self.has_truth = contract.conditions.pixels or contract.stored == "pixels"

    @property
    def looks(self) -> bool:
        """Whether it wants the records' own pictures: for a ceiling, or to compare with them."""
        return False

    @property
    def compares(self) -> bool:
        """Whether a figure compares with the records' own pictures, so that every batch is given them."""
        return any(figure.compares for figure in self.figures)

    @property
    def given(self) -> tuple[str, ...]:
        """Arrays of a record that it is given with every image: the task's."""
        return self.task.members

    @property
    def reads(self) -> tuple[str, ...]:
        """Arrays of a record that its evaluations need: those that it is given and, where it looks, the image's."""
        own = (self.contract.stored, *(("pixels",) if self.compares and self.has_truth else ())) if self.looks else ()
        return tuple(dict.fromkeys((*self.given, *own)))

    def name_of(self, figure: Figure) -> str:
        """The figure's name in metrics.json."""
        return figure.name + TO_RECONSTRUCTION if figure.compares and not self.has_truth else figure.name

    @abstractmethod
    def rows(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """What is counted of each picture (B, H, W, 3) uint8 as the model drew it, which is before `finish`.

        A share's entry is the number of right cases, and "of_NAME" that of all cases, 1 where it is missing. A mean's
        entry is its value. Entries of pooled figures are the judge's own.
        """

    def permuted(self, drawn: np.ndarray, given: Given) -> list[Row]:
        """The rows of pictures (B, H, W, 3) uint8, judged by what the next images were given; [] where that is no bound
        of a figure."""
        return self.rows(drawn, given) if self.permutes else []

    def finish(self, drawn: np.ndarray, given: Given) -> np.ndarray:
        """The pictures that a user gets: those that were drawn, (B, H, W, 3) uint8, after what belongs to the task."""
        return drawn

    def baseline(self, given: Given) -> np.ndarray | None:
        """The pictures of a trivial method, (B, H, W, 3) uint8; None where there is none."""
        return None

    def pooled(self, name: str, rows: Sequence[Row]) -> float | None:
        """A pooled figure of all rows together; None where nothing was counted."""
        raise NotImplementedError(name)

    def summary(self, rows: Sequence[Row], records: Sequence[Row] = ()) -> dict[str, Any]:
        """The figures of all rows with their error bars, under their names in metrics.json; figures of which nothing
        was counted are missing. records: rows of the records' own pictures."""
        metrics: dict[str, Any] = {}
        for figure in self.figures:
            metrics |= _with_error(figure, self.name_of(figure), rows, self.pooled)
        return metrics

    def show(self, given: Given, i: int) -> np.ndarray | None:
        """What image i of the batch was given, as a picture (H, W, 3) uint8 of its own size; None where that is no
        picture."""
        return None

    def words(self, given: Given, i: int) -> str:
        """What image i of the batch was given, in words; "" for nothing that can be said."""
        return given.captions[i]

    def balanced(self, records: Mapping[str, np.ndarray], images: int) -> bool:
        """Whether an evaluation of so many images draws conditions evenly instead of taking those of the records
        (K, ...)."""
        return False

    def members(self, records: Mapping[str, np.ndarray], numbers: Sequence[int], images: int) -> dict[str, np.ndarray]:
        """What images `numbers` are given: the members of the records (K, ...), which start over at their end."""
        return {name: rows[np.array(numbers) % len(rows)] for name, rows in records.items()}

    def facts(self, records: Mapping[str, np.ndarray], images: int) -> dict[str, Any]:
        """How its figures are made, for the card."""
        truth = {"truth": "pixels" if self.has_truth else "reconstruction"} if self.compares else {}
        network = self.perceptual
        absent = [figure for figure in PERCEIVED if network is None or figure != network.figure]
        figures = [self.name_of(figure) for figure in self.figures if figure not in absent]
        perceptual = {} if network is None else {"perceptual": network.name, "perceptual_sha256": network.sha256}
        return {"figures": figures} | truth | perceptual


def bounds(judge: Judge, others: Mapping[str, Sequence[Row]], records: Sequence[Row]) -> dict[str, float]:
    """The figures of other pictures' rows, such as {"permuted": ..., "reconstruction": ...}, as NAME_permuted and so
    on. Reconstructions that are compared with themselves are left out, and what a trivial method has for free."""
    metrics = {}
    for ending, rows in others.items():
        figures = judge.summary(rows, records) if rows else {}
        for figure in judge.figures:
            itself = ending == "reconstruction" and figure.compares and not judge.has_truth
            free = ending == "baseline" and figure.name in judge.free
            if (name := judge.name_of(figure)) in figures and not (itself or free):
                metrics[f"{name}_{ending}"] = figures[name]
    return metrics


def make_judge(contract: Contract, task: TaskConfig, perceptual: Perceptual | None = None) -> Judge:
    """The judge of a task, for a cache of this contract. perceptual: for a task with figures of it. Raises ShapeError
    for a cache whose pictures are too small for it."""
    judge: Judge = found(facts_of(task).judge)(contract, task)
    if perceptual is not None:
        assert perceptual.figure in judge.figures, "the configuration was not checked"
        require_side(min(map(min, contract.buckets)))
        judge.perceptual = perceptual
    return judge


def _with_error(figure: Figure, name: str, rows: Sequence[Row], pooled: Any) -> dict[str, float]:
    """A figure of all rows with its error bar; {} where nothing was counted."""
    if figure.kind == "pooled":
        if (value := pooled(figure.name, rows)) is None:
            return {}
        return {name: value} | _half_samples(name, figure, rows, pooled)
    counted = [row for row in rows if row.get(figure.name) is not None]
    if figure.kind == "mean":
        values = [float(row[figure.name]) for row in counted]  # type: ignore[arg-type]
        return {name: sum(values) / len(values), f"{name}_error": standard_error(values)} if values else {}
    right = round(sum(row[figure.name] for row in counted))  # type: ignore[misc]
    count = round(sum(row.get(f"of_{figure.name}", 1) for row in counted))  # type: ignore[misc]
    if not count:
        return {}
    low, high = wilson(right, count)
    return {name: right / count, f"{name}_low": low, f"{name}_high": high}


def _half_samples(name: str, figure: Figure, rows: Sequence[Row], pooled: Any) -> dict[str, float]:
    """The standard error of a pooled figure; {} where it is not known."""
    if len(rows) < FEWEST:
        return {}

    def of(numbers: Tensor) -> float:
        value = pooled(figure.name, [rows[i] for i in numbers.tolist()])
        return float("nan") if value is None else value

    error = half_sample_error(len(rows), of)
    return {f"{name}_error": error} if np.isfinite(error) else {}
