"""What the study has found so far, read from its folders."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compression.plan import Level, Plan
from benchmarks.compression.steps import Places, denoiser_cost, images_per_s, rows_of
from pipeline.report import run as report_run
from pipeline.report.run import spread

FID, ACCURACY, CLIP = "fid_democlip", "attribute_accuracy", "clip_score"


@dataclass(frozen=True)
class Measured:
    """One evaluation. n: samples seen. seconds: that training takes for them, at its rate. steps: of denoising.
    metrics: its figures."""

    n: int
    seconds: float
    steps: int
    metrics: dict[str, Any]

    def bar(self, figure: str) -> tuple[float, float] | None:
        """Ends of a figure's error bar."""
        return spread(self.metrics, figure)


@dataclass(frozen=True)
class Trained:
    """Training of one network. n: samples. images_per_s: of the short run before it, which had the machine to itself.
    memory_gb: most of a process."""

    n: int
    images_per_s: float
    memory_gb: float


@dataclass(frozen=True)
class Found:
    """All that was found of one f. stage, stage_figures: None and {} at f = 1. speed: images/s of drawing, by number of
    steps."""

    level: Level
    parameters: int
    flops: int
    denoiser: Trained
    evaluations: list[Measured] = field(default_factory=list)
    stage: Trained | None = None
    stage_figures: dict[str, Any] = field(default_factory=dict)
    speed: dict[int, float] = field(default_factory=dict)

    def over_time(self, steps: int) -> list[Measured]:
        """Evaluations with that number of denoising steps, in order of training."""
        return sorted((one for one in self.evaluations if one.steps == steps), key=lambda one: one.n)

    def over_steps(self) -> list[Measured]:
        """Evaluations at the end of training, in order of denoising steps."""
        last = max((one.n for one in self.evaluations), default=0)
        return sorted((one for one in self.evaluations if one.n == last), key=lambda one: one.steps)

    def final(self, steps: int) -> Measured | None:
        """The evaluation at the end of training with that number of steps."""
        ends = [one for one in self.over_time(steps) if one.n == self.denoiser.n]
        return ends[-1] if ends else None


def read(plan: Plan, places: Places) -> list[Found]:
    """What was found of each f whose denoiser is trained. Raises RunError for a run without steps."""
    return [read_level(plan, places, level) for level in plan.levels if places.run(level).exists()]


def read_level(plan: Plan, places: Places, level: Level) -> Found:
    """What was found of one f."""
    run = report_run.load(str(places.run(level)))
    denoiser = trained(places, places.run(level))
    evaluations = [
        Measured(one.n, one.n / denoiser.images_per_s, int(one.card["steps"]), one.metrics)
        for one in run.evaluations
        if one.name and one.card.get("sampler") == plan.sampler and one.metrics.get("images") == plan.val_images
    ]
    figures, speed = places.reconstructions(level) / "metrics.json", places.speed(level)
    rates = json.loads(speed.read_text(encoding="utf-8")) if speed.is_file() else {}
    return Found(
        level,
        *denoiser_cost(level),
        denoiser,
        evaluations,
        trained(places, places.stage_run(level)) if level.stage else None,
        json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {},
        {int(steps): float(rate) for steps, rate in rates.items()},
    )


def trained(places: Places, folder: Path) -> Trained:
    """What a run has trained on, and how fast it does alone. Raises RunError."""
    samples = max(int(row["n"]) for row in rows_of(folder) if row["kind"] == "train")  # a stop's last steps have no row
    memory = [value for _, value in report_run.load(str(folder)).curve("memory_gb")]
    return Trained(samples, images_per_s(places.probe(folder)), max(memory, default=0.0))


def missing(plan: Plan, found: list[Found]) -> list[str]:
    """Evaluations of the plan that are not there, in words."""
    words = []
    for one in found:
        there = {(measured.n, measured.steps) for measured in one.evaluations}
        wanted = [(part, plan.steps) for part in plan.points] + [(plan.parts, steps) for steps in plan.sweep]
        words += [
            f"f = {one.level.f} after {part}/{plan.parts} with {steps} steps"
            for part, steps in wanted
            if (one.denoiser.n // plan.parts * part, steps) not in there
        ]
        words += [] if one.speed else [f"f = {one.level.f}'s speed of drawing"]
    return words
