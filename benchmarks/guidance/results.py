"""What was measured so far, read from the evaluations of the copied run, and figures of several seeds together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.guidance.plan import Places, Plan
from benchmarks.guidance.steps import CASES
from pipeline.evaluation.metrics.error_bars import wilson

ATTRIBUTES, CLASS, LIKENESS = "attribute_accuracy", "class_accuracy", "guide_consistency"
CLASS_KEPT, START, KEPT, WHOLE = "class_kept", "psnr_start", "psnr_kept", "whole_shapes"


@dataclass(frozen=True)
class Measured:
    """One evaluation. steering: what its card says that images were given, without hashes. metrics: its figures."""

    sampler: str
    steps: int
    seed: int
    images: int
    steering: dict[str, Any]
    metrics: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Value:
    """A figure of one or several seeds with the ends of its error bar. A share has its 95 % interval (Wilson) of all
    pictures together; any other a standard error on each side."""

    value: float
    low: float
    high: float
    share: bool

    def __sub__(self, other: Value) -> Value:
        """The difference of two figures that are independent, with its standard error."""
        error = math.hypot(self.high - self.low, other.high - other.low) / 2
        value = self.value - other.value
        return Value(value, value - error, value + error, share=False)

    def __str__(self) -> str:
        if self.share:
            return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.1f} +- {(self.high - self.low) / 2:.1f}"


def read(run: Path) -> list[Measured]:
    """The evaluations of a run directory, in order of their names."""
    found = []
    for path in sorted((run / "evals").glob("*/metrics.json")):
        card = json.loads((path.parent / "card.json").read_text(encoding="utf-8"))
        facts = {name: fact for name, fact in card["steering"].items() if not name.endswith("_sha256")}
        metrics = json.loads(path.read_text(encoding="utf-8"))
        one = Measured(card["sampler"], card["steps"], card["seed"], card["images"], facts, metrics, path.parent)
        found.append(one)
    return found


def of(
    found: Sequence[Measured], steering: dict[str, Any], sampler: str, images: int, seeds: Sequence[int]
) -> list[Measured]:
    """The evaluations of these seeds, in their order, that were steered in this way; without those that there are
    not."""
    known = {
        one.seed: one
        for one in found
        if one.sampler == sampler
        and one.images == images
        and {key: one.steering.get(key) for key in (*steering, *_decisive(one.steering))} == steering
    }
    return [known[seed] for seed in seeds if seed in known]


def _decisive(steering: dict[str, Any]) -> list[str]:
    """Keys that say by what images were steered, and not how."""
    return [key for key in steering if key not in ("guide.factor", "guide.cutouts")]


def together(measured: Sequence[Measured], name: str) -> Value | None:
    """A figure of the pictures of several seeds: a share of all of them, or the mean of figures in dB, whose errors
    are independent. None where there is none."""
    known = [one for one in measured if isinstance(one.metrics.get(name), float | int)]
    if not known:
        return None
    values = [float(one.metrics[name]) for one in known]
    if f"{name}_low" in known[0].metrics:
        right = sum(round(value * one.images) for value, one in zip(values, known, strict=True))
        count = sum(one.images for one in known)
        return Value(right / count, *wilson(right, count), share=True)
    return mean(values, [float(one.metrics.get(f"{name}_error") or 0.0) for one in known])


def mean(values: Sequence[float], errors: Sequence[float]) -> Value:
    """The mean of independent figures."""
    value, error = sum(values) / len(values), math.hypot(*errors) / len(errors)
    return Value(value, value - error, value + error, share=False)


def chosen_weight(plan: Plan, found: Sequence[Measured]) -> float:
    """CLIP's weight: the one with which most of all that captions claim is right, as a mean over kinds of claims, which
    tells weights apart where hardly any picture has all of it. The first of equals; the middle one where nothing is
    measured."""
    scores = {}
    for weight in plan.clip:
        for one in of(found, {"guide.clip": weight}, plan.sampler, plan.few, (plan.choice_seed,)):
            scores[weight] = claims(one)
    return max(scores, key=lambda weight: scores[weight]) if scores else plan.clip[len(plan.clip) // 2]


def claims(one: Measured) -> float:
    """Mean over kinds of claims of the share that is right."""
    by_kind = one.metrics.get(f"{ATTRIBUTES}_by_attribute") or {}
    return sum(by_kind.values()) / len(by_kind) if by_kind else 0.0


def kept(plan: Plan, places: Places) -> dict[str, list[dict[str, Any]]]:
    """Figures of benchmarks.guidance.kept by case, those of each seed."""
    paths = {case: [places.kept(case, seed) for seed in plan.seeds] for case in CASES}
    return {
        case: [json.loads(path.read_text(encoding="utf-8")) for path in of_case if path.is_file()]
        for case, of_case in paths.items()
    }
