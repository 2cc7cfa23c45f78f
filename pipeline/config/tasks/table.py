"""The table of tasks: from a task's name to everything that it is, in the rooms that know it.

What needs PyTorch is named "module:attribute" and is imported where it is wanted (pipeline/config/tasks/found.py), so
that a login node can read the table. Code that depends on the task asks this table, and does not compare names: a new
task is its files and one row here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.tasks import figures as f
from pipeline.config.tasks import kinds
from pipeline.config.tasks.base import TaskConfig


@dataclass(frozen=True, kw_only=True)
class TaskBasics:
    """What every task has, also one whose network draws no pictures."""

    config: type[TaskConfig]
    """Its keys, and what it reads and gives (kinds.py)."""
    figures: tuple[f.Figure, ...] = ()
    """Figures that judge it; the first that an evaluation has is what "best" means."""
    recipe: str
    """The experiment that trains it on captioned shapes in minutes (conf/experiment/)."""


@dataclass(frozen=True, kw_only=True)
class TaskFacts(TaskBasics):
    """Where to find what a task is whose network draws pictures."""

    network: str
    """Its module, which turns a batch into the UNet's inputs (models/tasks/)."""
    judge: str
    """What computes the figures that judge its pictures, and how they are shown (evaluation/tasks/)."""
    requests: str
    """What `latentmill sample` may be asked for (inference/requests/)."""
    asks: tuple[str, ...]
    """Keys of `latentmill sample` by which it is asked."""
    export: str
    """What other software can hold of it (interchange/tasks/)."""


TASK_FACTS: dict[str, TaskFacts] = {
    name: TaskFacts(
        config=config,
        network=f"pipeline.models.tasks.{module}:{network}",
        judge=f"pipeline.evaluation.tasks.{module}:JUDGE",
        figures=figures,
        requests=f"pipeline.inference.requests.{module}:REQUESTS",
        asks=asks,
        export=f"pipeline.interchange.tasks.{module}:EXPORT",
        recipe="demo" if config is kinds.TextTask else f"shapes_{name}",
    )
    for name, module, network, config, figures, asks in (
        ("text", "text", "Text", kinds.TextTask, f.TEXT, ("prompt", "negative")),
        ("unconditional", "unconditional", "Unconditional", kinds.UnconditionalTask, f.UNCONDITIONAL, ()),
        ("class", "classes", "Classes", kinds.ClassTask, f.CLASSES, ("class",)),
        ("layout", "layout", "Layout", kinds.LayoutTask, f.LAYOUT, ("boxes", "prompt", "negative")),
        ("semantic", "semantic", "Semantic", kinds.SemanticTask, f.SEMANTIC, ("labels",)),
        ("superres", "superres", "Superres", kinds.SuperresTask, f.SUPERRES, ("image", "noise", "prompt", "negative")),
        ("inpaint", "inpaint", "Inpaint", kinds.InpaintTask, f.INPAINT, ("image", "mask", "prompt", "negative")),
    )
}
"""The facts of every task that draws pictures, by its name in `task=`."""

WITHOUT_PICTURES: dict[str, TaskBasics] = {
    "classifier": TaskBasics(config=kinds.ClassifierTask, figures=f.CLASSIFIER, recipe="shapes_classifier"),
}
"""The tasks whose networks draw none, by the same names. Only training and evaluations know them."""


def all_tasks() -> dict[str, TaskBasics]:
    """Every task, by its name."""
    return {**TASK_FACTS, **WITHOUT_PICTURES}
