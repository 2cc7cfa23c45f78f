"""What was planned for a run beside what happened: plan.json, of `latentmill plan json=`, and the run's rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pipeline.config.values.bounds import Between
from pipeline.errors import ParseError
from pipeline.parsing.typed import build
from pipeline.parsing.values import parse_json
from pipeline.planning.plan.figures import FORMAT, Basis, value_words

PLAN_KEY = "plan.json"
PLAN_BYTES = 1 << 24
"""Of plan.json, at most: with a choice for every ZeRO stage and micro-batch."""
MOST = 200
"""Figures of a section."""


@dataclass(frozen=True, kw_only=True)
class PlannedFigure:
    """A figure as plan.json holds it."""

    name: str
    value: Annotated[float, Between(0, 1e30)]
    unit: str
    basis: Basis
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class PlannedSection:
    """A section of plan.json."""

    figures: tuple[PlannedFigure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedChoice:
    """The ZeRO stage and micro-batch that the figures are of. fits: null of a plan without GPUs, whose processes hold
    more than tensors."""

    stage: Annotated[int, Between(0, 3)]
    micro_batch: Annotated[int, Between(1, 2**40)]
    peak: Annotated[int, Between(0, 2**60)]
    fits: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a page shows of plan.json."""

    format: int
    title: str
    sections: dict[str, PlannedSection]
    chosen: PlannedChoice | None = None


class Happened(Protocol):
    """A run (run.py)."""

    @property
    def rows(self) -> list[dict[str, Any]]: ...
    @property
    def seconds(self) -> float: ...
    @property
    def samples(self) -> int: ...
    @property
    def planned(self) -> Planned | None: ...
    @property
    def training_evaluations(self) -> Sequence[Any]: ...


def parse_plan(data: bytes) -> Planned:
    """The content of plan.json. Raises ParseError."""
    plan = build(Planned, parse_json(data, PLAN_BYTES), unknown="pass")
    if plan.format != FORMAT:
        raise ParseError(f"its format is {plan.format}; this program reads {FORMAT}")
    if any(len(section.figures) > MOST for section in plan.sections.values()):
        raise ParseError(f"it holds a section of more than {MOST} figures")
    return plan


def compared(run: Happened) -> list[tuple[str, str, str, str, str]]:
    """Rows (what, planned, basis, happened, happened / planned); [] of a run without a plan. What has not happened yet
    is ""."""
    if run.planned is None:
        return []
    happened = _happened(run)
    rows = []
    for name in ("training", "evaluations", "storage", "whole"):
        section = run.planned.sections.get(name)
        for figure in section.figures if section else ():
            if figure.name in happened:
                rows.append(_row(figure, happened[figure.name]))
    if run.planned.chosen is not None and run.planned.chosen.fits is not None:
        peak = PlannedFigure(
            name="peak of a rank", value=float(run.planned.chosen.peak), unit="bytes", basis="arithmetic"
        )
        rows.append(_row(peak, 1e9 * _largest(run.rows, "memory_gb")))
    return rows


def _row(figure: PlannedFigure, value: float | None) -> tuple[str, str, str, str, str]:
    ratio = f"{value / figure.value:.2f}" if value and figure.value else ""
    words = value_words(value, figure.unit) if value else ""
    return figure.name, value_words(figure.value, figure.unit), figure.basis, words, ratio


def _happened(run: Happened) -> dict[str, float | None]:
    """What a run's rows tell of the figures of a plan, by their names there."""
    steps = sum(sum(row.get("steps_s") or ()) for row in run.rows if row.get("kind") == "train")
    committed, spent = _of_lives(run.rows)
    looked = sum(e.metrics.get("seconds") or 0.0 for e in run.training_evaluations)
    hours = run.seconds / 3600
    return {
        "samples": float(run.samples),
        "images/s": _median(run.rows, "images_per_s"),
        "seconds of a step": _median(run.rows, "step_s"),
        "MFU": _median(run.rows, "mfu"),
        "hours of steps": steps / 3600,
        "hours of evaluations": looked / 3600,
        "bytes of a checkpoint": committed,
        "hours": hours,
        "device-hours": spent / 3600,
    }


def _of_lives(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(bytes of the largest checkpoint on all ranks, seconds of all ranks), where each start may be on another number
    of ranks. Time between a process's last row and the next one's start counts for none."""
    largest = spent = 0.0
    world, before = 1, None
    for row in rows:
        if row.get("kind") == "start":
            world = row.get("world") or 1
        elif before is not None:
            spent += world * (row["time"] - before)
        if row.get("kind") == "checkpoint":
            largest = max(largest, world * float(row.get("bytes") or 0))
        before = row["time"]
    return largest, spent


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get("kind") == "train" and row.get(name)]
    return float(statistics.median(values)) if values else None


def _largest(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return max((float(row[name]) for row in rows if row.get(name)), default=0.0)
