"""Imports what the table of tasks names, and finds what it says of a task."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pipeline.config.tasks.base import TaskConfig
from pipeline.config.tasks.figures import CLIP_SCORE, OF_FEATURES, SHORTCUT, Figure
from pipeline.config.tasks.table import TASK_FACTS, TaskFacts

BOUNDS = ("real", "reconstruction", "baseline", "permuted")
"""Ends of the names of what a figure lies between: of real images, of these after the autoencoder, of a trivial
method's, and of the same pictures judged by what the next image was given."""


def facts_of(task: TaskConfig) -> TaskFacts:
    """The row of a task."""
    return TASK_FACTS[task.name]


def found(place: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def figures_of(task: TaskConfig) -> tuple[Figure, ...]:
    """Every figure that an evaluation of the task may have: its own, the CLIP score, and those of features."""
    return (*facts_of(task).figures, *((CLIP_SCORE,) if task.takes_text else ()), *OF_FEATURES)


def all_figures() -> tuple[Figure, ...]:
    """The figures of every task in the table's order, then the CLIP score."""
    return tuple(dict.fromkeys((*(figure for facts in TASK_FACTS.values() for figure in facts.figures), CLIP_SCORE)))


def present(metrics: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """The figures of any task that metrics hold, with the names that they have there."""
    return [(name, figure) for figure in all_figures() for name in figure.names if metrics.get(name) is not None]


def best_figures(task: TaskConfig, best: str) -> tuple[Figure, ...]:
    """The figures that checkpoint.best= names, of which the first that evaluations have counts. Empty for none, and for
    a name that the task's evaluations do not have."""
    figures = figures_of(task)
    return figures if best == SHORTCUT else tuple(figure for figure in figures if figure.name == best)
