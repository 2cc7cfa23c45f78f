"""What happened beside what was planned, of a run that goes on with another number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.planning.happened import Planned, PlannedFigure, PlannedSection, compared

FIGURES = (
    PlannedFigure(name="bytes of a checkpoint", value=4e9, unit="bytes", basis="arithmetic"),
    PlannedFigure(name="hours", value=4.0, unit="hours", basis="arithmetic"),
    PlannedFigure(name="device-hours", value=10.0, unit="hours", basis="arithmetic"),
)
PLAN = Planned(format=1, title="", sections={"whole": PlannedSection(figures=FIGURES)})


@dataclass
class Run:
    rows: list[dict[str, Any]]
    seconds: float
    samples: int = 1000
    planned: Planned | None = PLAN
    training_evaluations: list[Any] = field(default_factory=list)


def test_each_life_of_a_run_counts_with_its_own_number_of_ranks() -> None:
    """Two hours on four ranks, an hour in the queue, then two hours on one."""
    rows = [
        {"kind": "start", "time": 0.0, "world": 4, "n": 0},
        {"kind": "checkpoint", "time": 3600.0, "bytes": 1e9, "n": 500},
        {"kind": "train", "time": 7200.0, "n": 600},
        {"kind": "start", "time": 10_800.0, "world": 1, "n": 500},
        {"kind": "checkpoint", "time": 14_400.0, "bytes": 4e9, "n": 900},
        {"kind": "train", "time": 18_000.0, "n": 1000},
    ]
    happened = {row[0]: row[3:] for row in compared(Run(rows, seconds=14_400.0))}
    assert happened["bytes of a checkpoint"] == ("4 GB", "1.00")
    assert happened["hours"] == ("4 h", "1.00")
    assert happened["device-hours"] == ("10.0 h", "1.00"), "4 x 2 + 1 x 2"


def test_a_run_without_a_plan_has_nothing_to_compare() -> None:
    assert compared(Run([], 0.0, planned=None)) == []
