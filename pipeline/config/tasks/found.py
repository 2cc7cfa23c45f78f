"""Imports what the table of tasks names, and finds what it says of a task."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.run import RunConfig
from pipeline.config.tasks.base import TaskConfig
from pipeline.config.tasks.figures import (
    CLIP_SCORE,
    FIRST_STAGE,
    FIRST_STAGE_COSTS,
    OF_CODES,
    OF_FEATURES,
    RFID,
    SHORTCUT,
    STEERED,
    Figure,
    perceived,
)
from pipeline.config.tasks.table import TASK_FACTS, TaskFacts, all_tasks
from pipeline.config.train import TrainConfig
from pipeline.config.values.bounds import require
from pipeline.config.values.distances import require_distance

BOUNDS = ("real", "reconstruction", "baseline", "permuted")
"""Ends of the names of what a figure lies between: of real images, of these after the autoencoder, of a trivial
method's, and of the same pictures judged by what the next image was given."""


def facts_of(task: TaskConfig) -> TaskFacts:
    """The row of a task that draws pictures."""
    return TASK_FACTS[task.name]


def own_figures(task: TaskConfig) -> tuple[Figure, ...]:
    """The figures of a task's row, whatever it is."""
    return all_tasks()[task.name].figures


def found(place: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def figures_of(task: TaskConfig) -> tuple[Figure, ...]:
    """Every figure that an evaluation of the task may have: its own, and of pictures the CLIP score and those of
    features."""
    if not task.draws:
        return own_figures(task)
    return (*own_figures(task), *((CLIP_SCORE,) if task.takes_text else ()), *OF_FEATURES)


def all_figures() -> tuple[Figure, ...]:
    """The figures of every task in the table's order, those of what steers images, those of autoencoders, then the CLIP
    score."""
    of_tasks = [figure for basics in all_tasks().values() for figure in basics.figures]
    named = {figure.name: figure for figure in (*of_tasks, *STEERED, *FIRST_STAGE, *FIRST_STAGE_COSTS)}
    named |= {figure.name: figure for figure in of_tasks}  # these have more names
    return (*named.values(), CLIP_SCORE)


def present(metrics: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """The figures of any task that metrics hold, with the names that they have there."""
    return [(name, figure) for figure in all_figures() for name in figure.names if metrics.get(name) is not None]


def require_perceived(task: TaskConfig, perceptual: str, key: str) -> None:
    """Raise ConfigError for weights of the perceptual distance where no figure of the task is one. key: of the weights,
    for messages."""
    require_distance(perceptual, key)
    require(
        perceptual == "none" or perceived(perceptual) in own_figures(task),
        f"{key}={perceptual} with task={task.name}, whose evaluations compare no pictures: leave it out ({key}=none)",
    )


def require_start(task: TaskConfig, strength: float | None) -> None:
    """Raise ConfigError where sampling of the task cannot begin from an image. strength: None where it should not."""
    require(
        strength is None or task.may_begin,
        f"strength={strength}: a model of task={task.name} makes a large image of a small one and begins from noise: "
        "leave strength out",
    )


def best_figures(task: TaskConfig, best: str) -> tuple[Figure, ...]:
    """The figures that checkpoint.best= names, of which the first that evaluations have counts. Empty for none, and for
    a name that the task's evaluations do not have."""
    return _named(figures_of(task), best)


def figures_of_run(config: RunConfig) -> tuple[Figure, ...]:
    """Every figure that an evaluation of what a run trains may have."""
    if isinstance(config, TrainConfig):
        return figures_of(config.task)
    assert isinstance(config, AutoencoderConfig)
    has_codes = config.autoencoder.regularizer == "vq"
    return (*(figure for figure in FIRST_STAGE if has_codes or figure not in OF_CODES), RFID)


def best_of(config: RunConfig) -> tuple[Figure, ...]:
    """As best_figures, for whatever a run trains."""
    return _named(figures_of_run(config), config.checkpoint.best)


def _named(figures: tuple[Figure, ...], best: str) -> tuple[Figure, ...]:
    return figures if best == SHORTCUT else tuple(figure for figure in figures if figure.name == best)
